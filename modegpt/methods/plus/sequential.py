"""The sequential pass: layer by layer, each module is reduced on the stream that all reductions before it leave."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from modegpt.calibration.calibration import Calibration
from modegpt.calibration.stream import HiddenStates, Storage
from modegpt.cost.work import forward
from modegpt.decompositions.elimination import eliminate, surviving
from modegpt.decompositions.experts import expert_gram, token_report
from modegpt.decompositions.linalg import PSDFactor, relative
from modegpt.decompositions.modules import ExpertWeights, MLPWeights, Reduction, ValueOutputWeights
from modegpt.decompositions.nystrom import ridge_leverage
from modegpt.decompositions.regression import Moments, Refit, held_out_refit
from modegpt.decompositions.selection import fold_value_bias, group_heads, keep_mlp, largest
from modegpt.decompositions.svd import balance, product_svd
from modegpt.methods.modegpt import assemble_layer
from modegpt.methods.plus.query_key import candidates, choose, sample
from modegpt.methods.plus.streams import ARGUMENTS, Observation, Split, Tap, known_attention, known_mlp, observe
from modegpt.methods.plus.sums import Parts, Solution, Sums
from modegpt.methods.plus.switches import Switches
from modegpt.methods.plus.temperature import Compared
from modegpt.models import (
    Family,
    LayerShape,
    build_layer,
    compressed_config,
    gained,
    merged_tensors,
    output_gain,
    read_mlp,
    read_mlps,
    read_query_key,
    read_value_output,
    ungained,
)


@dataclass
class SequentialPass:
    """The dense stream X and the compressed stream X~ in front of the same layer, and what every layer is reduced with.

    Args:
        options: the ingredients.
        split: which calibration tokens are held out.
        generator: of the query positions that the query-key selection looks at.
        skip_layers: layers that are left as they are; they correct nothing either.
        compared: the streams that the temperature is fitted on, or None.
        moved: whether a layer before this one was changed, so that X~ differs from X.
        finished: whether all layers are behind.
    """

    calibration: Calibration
    options: Switches
    dense: HiddenStates
    compressed: HiddenStates
    split: Split
    generator: torch.Generator
    skip_layers: tuple[int, ...] = ()
    compared: Compared | None = None
    moved: bool = False
    finished: bool = False

    @classmethod
    def start(
        cls,
        calibration: Calibration,
        options: Switches,
        *,
        generator: torch.Generator,
        skip_layers: tuple[int, ...],
        compared: Compared | None,
        finished: bool,
    ) -> "SequentialPass":
        """Both streams in front of the first layer."""
        return cls(
            calibration,
            options,
            dense=calibration.embed(even=True),
            compressed=calibration.embed(even=True),
            split=Split.of(calibration.tokens.ids, batch_size=calibration.batch_size, world=calibration.world),
            generator=generator,
            skip_layers=skip_layers,
            compared=compared,
            finished=finished,
        )

    @property
    def streams(self) -> dict[str, HiddenStates]:
        """All that is needed in front of the next layer, by name; behind the last, what the temperature needs."""
        streams = {} if self.finished else {"dense": self.dense, "compressed": self.compressed}
        if self.compared is not None:
            streams |= {"compared_dense": self.compared.dense, "compared_compressed": self.compared.compressed}
        return streams

    def layer(self, index: int, layer: nn.Module, ranks: Mapping[str, int]) -> "LayerPass":
        """Reduce the dense ``layer`` to ``ranks``; all streams move on. Returns what became of it."""
        work = LayerPass(walk=self, index=index, layer=layer, moved=self.moved and index not in self.skip_layers)
        work.reduce(ranks)
        self.moved = self.moved or bool(work.tensors)
        self.finished = index + 1 == self.calibration.num_layers
        if self.compared is not None:
            with self.calibration.meter.stage("temperature", counted=True):
                self.compared.advance(index, layer, work.reduced)
        return work


@dataclass(frozen=True)
class Targets:
    """What the dense layer makes of the dense stream, a tensor (batch, sequence, d_h) a batch.

    Args:
        attention: what the attention adds, and ``beta`` times the error of the stream in front.
        mlp: what the MLP adds.
        middle: the stream that the MLP's output is added to; the error of its compressed form is not known yet.
        attention_input, mlp_input: what the norms hand to the input maps; empty unless these are aligned.
        attention_alone: what the attention adds; empty in the sequential pass.
    """

    attention: list[Tensor]
    mlp: list[Tensor]
    middle: list[Tensor]
    attention_input: list[Tensor]
    mlp_input: list[Tensor]
    attention_alone: list[Tensor]

    @classmethod
    def none(cls, storage: Storage) -> "Targets":
        """No batch yet."""
        return cls(**{each.name: storage.batches() for each in fields(cls)})


@dataclass
class LayerPass:
    """One layer of the pass. ``reduce`` takes these steps, in the order of the layer's own forward:

    1. Targets: the dense layer runs on X, which moves on. What its attention and its MLP add is what the solves aim at.
    2. Alignment (``align``): query, key and value maps become ``A W`` with ``A = argmin ||N(X~) A - N(X)||^2`` over the
       streams behind the norm, near the identity.
    3. Query-key: of several selections each key head takes the one whose attention output errs least on held-out
       windows.
    4. Value-output: the subspace by the attention outputs Z~ that the reduced queries and keys leave; W_O solved for
       ``Z W_O + beta (X - X~)``.
    5. Alignment of the MLP's input maps, on the stream behind the reduced attention.
    6. MLP: the channels by the hidden states h~ behind all that; W_D solved for ``h W_D + beta (X' - X~')``, X' the
       stream between attention and MLP.
    7. The reduced layer runs on X~, which moves on.

    A module at full rank is left alone until X~ has moved, and then has its output matrix solved like the others',
    where ``refit`` says so: it corrects what came before. Without ``sequential`` every step reads the dense stream.

    Args:
        layer: the dense layer; from steps 2 and 5 on, with aligned input maps.
        moved: whether X~ differs from X, and may be corrected for.
        reductions: the modules reduced so far.
        aligned: by name, the tensors of aligned input maps, of full size.
        alignment: how they were solved, by ``attention`` and ``mlp``.
        shape, tensors, reduced: what the layer became, its changed tensors, and the layer made of them, ready to run.
    """

    walk: SequentialPass
    index: int
    layer: nn.Module
    moved: bool
    reductions: dict[str, Reduction] = field(default_factory=dict)
    aligned: dict[str, Tensor] = field(default_factory=dict)
    alignment: dict[str, dict[str, Any]] = field(default_factory=dict)
    shape: LayerShape = field(init=False)
    tensors: dict[str, Tensor] = field(init=False)
    reduced: nn.Module = field(init=False)

    @property
    def stream(self) -> HiddenStates:
        """X~: in front of the layer until step 7, which is where X was too unless the pass is sequential."""
        return self.walk.compressed

    @property
    def stored(self) -> Storage:
        """Where what is seen of all batches waits."""
        return self.walk.calibration.stored

    @property
    def options(self) -> Switches:
        """The ingredients."""
        return self.walk.options

    @property
    def family(self) -> Family:
        """Where the layer has its linears."""
        return self.walk.calibration.family

    @property
    def beta(self) -> float:
        """What of the stream's error a block makes up for: nothing through a norm, which takes any scale from it."""
        return 0.0 if self.family.branch_norms else self.options.beta

    def reduce(self, ranks: Mapping[str, int]) -> None:
        """The steps above, at ``ranks``."""
        family, options = self.family, self.options
        corrects = options.refit and self.moved

        # 1. targets
        targets = self._dense_targets()

        # 2. alignment of the attention's input maps
        if options.align and self.moved:
            inputs = [family.query_path, family.key_path, family.value_path]
            self._align("attention", family.query(self.layer), targets.attention_input, inputs)

        # 3. query-key
        if ranks["query_key"] < read_query_key(family, self.layer).inner_size:
            self._reduce_query_key(ranks["query_key"])

        # 4. value-output
        if corrects or ranks["value_output"] < read_value_output(family, self.layer).inner_size:
            attention = self._reduce_value_output(ranks["value_output"], targets)
        else:
            attention = self._attention_outputs() if options.sequential else []
        if not options.sequential:
            attention = targets.attention_alone
        targets = replace(targets, attention=[], attention_input=[])  # which nobody reads any more

        # 5. alignment of the MLP's input maps
        if options.align and (self.moved or self.reductions):
            paths = [path for path in (family.gate_path, family.up_path) if path]
            inputs = [each for path in paths for each in family.of_experts(path, len(family.downs(self.layer)))]
            self._align("mlp", family.mlp_ends(self.layer)[0], targets.mlp_input, inputs, attention)

        # 6. MLP
        mlp: list[Tensor] | None = None
        if corrects or ranks["mlp"] < read_mlps(family, self.layer).inner_size:
            reduce = self._reduce_mlp if family.experts_path is None else self._reduce_experts
            mlp = reduce(ranks["mlp"], targets, attention)

        # 7. the compressed stream moves on
        self.shape, self.tensors, self.reduced = self._result()
        if options.sequential:
            self._advance(self.reduced, attention, mlp)
        else:
            for b, x in enumerate(self.walk.dense.batches):
                self.stream.batches[b] = x

    def _result(self) -> tuple[LayerShape, dict[str, Tensor], nn.Module]:
        """Shape, changed tensors and runnable layer of the reductions made so far."""
        config = self.walk.calibration.model.config
        shape, changed = assemble_layer(self.family, config, self.reductions)
        changed = self.aligned | changed
        if not changed:
            return shape, changed, self.layer
        sized = compressed_config(config, [shape] * config.num_hidden_layers)
        return shape, changed, build_layer(sized, self.index, merged_tensors(self.family, self.layer, changed))

    # 1. and 7.: the streams

    def _dense_targets(self) -> Targets:
        family, layer, beta, dense = self.family, self.layer, self.beta, self.walk.dense
        taps: dict[str, Tap] = {
            "attention": (family.output(layer), "output"),
            "mlp": (family.mlp_ends(layer)[1], "output"),
            **self._middle_tap(layer),
        }
        if self.options.align:
            taps |= {
                "attention_input": (family.query(layer), "input"),
                "mlp_input": (family.mlp_ends(layer)[0], "input"),
            }
        targets = Targets.none(self.stored)
        for seen in observe(layer, self.index, dense, taps, stop=False):
            added = seen.seen["attention"]
            if not self.options.sequential:
                targets.attention_alone.append(added)
            targets.attention.append(added + beta * (seen.x - self.stream.batches[seen.batch]))
            targets.mlp.append(seen.seen["mlp"])
            targets.middle.append(self._middle(seen, added))
            if self.options.align:
                targets.attention_input.append(seen.seen["attention_input"])
                targets.mlp_input.append(seen.seen["mlp_input"])
            assert seen.output is not None
            dense.batches[seen.batch] = seen.output
        return targets

    @property
    def _post_norm(self) -> bool:
        """Whether the norms come after the sums (some OPT), so that the MLP's own input is what enters its sum."""
        return not getattr(self.walk.calibration.model.config, "do_layer_norm_before", True)

    def _middle_tap(self, layer: nn.Module) -> dict[str, Tap]:
        return {"middle": (self.family.up(layer), "input")} if self._post_norm else {}

    def _middle(self, seen: Observation, attention: Tensor) -> Tensor:
        """The residual stream that the MLP's output is added to."""
        return seen.seen["middle"] if self._post_norm else seen.x + attention

    def _attention_outputs(self) -> list[Tensor]:
        """What the attention as reduced so far adds to the compressed stream."""
        layer = self._result()[2]
        taps: dict[str, Tap] = {"attention": (self.family.output(layer), "output")}
        outputs = self.stored.batches()
        for seen in observe(layer, self.index, self.stream, taps, stop=True):
            outputs.append(seen.seen["attention"])
        return outputs

    def _advance(self, reduced: nn.Module, attention: Sequence[Tensor], mlp: Sequence[Tensor] | None) -> None:
        known = [known_attention(self.family, reduced, attention)]
        if mlp is not None:
            known.append(known_mlp(self.family, reduced, mlp))
        for seen in observe(reduced, self.index, self.stream, {}, stop=False, known=known):
            assert seen.output is not None and torch.isfinite(seen.output).all(), (
                f"layer {self.index}: activations of the compressed model are not finite"
            )
            self.stream.batches[seen.batch] = seen.output

    # 2. and 5.: alignment

    def _align(
        self,
        name: str,
        reader: nn.Module,
        dense_inputs: list[Tensor],
        paths: list[str],
        attention: Sequence[Tensor] | None = None,
    ) -> None:
        """Refit the input maps ``paths``: ``W <- A W``, ``A = argmin ||x~ A - x||^2`` near the identity.

        x~ and x are the compressed and the dense stream after the norm, so one A (d_h, d_h) serves all maps that read
        them. The layer runs up to ``reader``, which should be the first that reads them.
        """
        layer = self.layer
        taps: dict[str, Tap] = {"x": (reader, "input")}
        size = self.walk.calibration.model.config.hidden_size
        sums = self._sums(size, size)
        known = [] if attention is None else [known_attention(self.family, layer, attention)]
        for seen in observe(layer, self.index, self.stream, taps, stop=True, known=known):
            sums.update(seen.batch, seen.seen["x"], dense_inputs[seen.batch])
        sums.pool()
        identity = torch.eye(size, dtype=torch.float64, device=sums.parts[False].G.device)
        refit = held_out_refit(sums.parts[False], sums.parts[True], (identity, identity))
        self.alignment[name] = refit.report()
        for path in paths:
            linear: Any = layer.get_submodule(path)
            self.aligned[f"{path}.weight"] = (linear.weight.double() @ refit.W.mT).to(linear.weight.dtype)
            if linear.bias is not None:
                self.aligned[f"{path}.bias"] = linear.bias.detach()
        dense_config = compressed_config(self.walk.calibration.model.config)
        self.layer = build_layer(dense_config, self.index, merged_tensors(self.family, layer, self.aligned))

    # 3.: query-key

    def _reduce_query_key(self, rank: int) -> None:
        weights, options = read_query_key(self.family, self.layer), self.options
        states = sample(
            self.family,
            self.layer,
            self.index,
            self.stream,
            self.walk.split,
            num_windows=options.query_key_windows,
            queries_per_window=options.queries_per_window,
            precision=self.walk.calibration.precision,
            generator=self.walk.generator,
        )
        choice = choose(weights, candidates(weights, states, rank, improved=options.query_key == "checked"), states)
        counts = {name: choice.names.count(name) for name in dict.fromkeys(choice.names)}
        self.reductions["query_key"] = Reduction(
            choice.weights,
            relative_error=choice.relative_error,
            numerics={"chosen": counts, "held_out": choice.held_out},
        )

    # 4.: value-output

    def _reduce_value_output(self, rank: int, targets: Targets) -> list[Tensor]:
        """Returns what the reduced attention adds to the stream."""
        weights = read_value_output(self.family, self.layer)
        num_heads, num_groups, d = len(weights.W_O), len(weights.W_V), weights.inner_size
        folded = fold_value_bias(weights)
        constant = self._constant(folded)
        b_V = None if weights.b_V is None else weights.b_V.repeat_interleave(num_heads // num_groups, dim=0).flatten()
        layer = self._result()[2] if self.options.sequential else self.layer
        taps: dict[str, Tap] = {"states": (self.family.output(layer), "input")}
        if self.options.value_output == "values":
            taps["values"] = (self.family.value(layer), "output")
        gain = output_gain(self.family, self.layer, "attention")
        sums = self._sums(num_heads * d + constant, weights.W_O.shape[-1], gain)
        world, G, read = self.walk.calibration.world, None, self.stored.batches()
        for seen in observe(layer, self.index, self.stream, taps, stop=True):
            z = seen.seen["states"] if b_V is None else seen.seen["states"] - b_V
            t = targets.attention[seen.batch]
            sums.update(seen.batch, z, t if folded is None else t - folded, constant=bool(constant))
            read.append(z)
            if "values" in taps:
                G = weights.W_V.new_zeros(num_groups, d, d, dtype=torch.float64) if G is None else G
                world.add(G, self._value_gram(self.walk.split.counting(seen.batch, seen.seen["values"]), weights))
        sums.pool()
        if G is not None:
            world.pool([G])
        solution = self._solve_value_output(sums, weights, rank, constant=constant, G=G)
        (P, P_all, factor), W = solution.kept, ungained(solution.refit.W, gain)
        W_V, B = balance(weights.W_V.double() @ P, W[: num_heads * rank].unflatten(0, (num_groups, -1, rank)))
        b_O = self._with_constant(folded, W, constant)
        reduced = ValueOutputWeights(
            W_V=W_V.to(weights.W_V.dtype), W_O=B.flatten(0, 1).to(weights.W_O.dtype), b_V=None, b_O=b_O
        )
        self.reductions["value_output"] = Reduction(
            reduced, relative_error=self._error((sums, solution)), numerics=factor.numerics | solution.refit.report()
        )
        whole_map = (P_all @ W)[: num_heads * d].to(weights.W_O.dtype)
        outputs = self.stored.batches()
        with forward():
            for z in read:
                outputs.append(z @ whole_map if b_O is None else z @ whole_map + b_O)
        return outputs

    def _value_gram(self, values: Tensor, weights: ValueOutputWeights) -> Tensor:
        """(H_kv, d, d) of one batch of ``values`` (batch, sequence, H_kv d), without their bias."""
        v = values.unflatten(-1, (-1, weights.inner_size)).to(self.walk.calibration.precision)
        v = v if weights.b_V is None else v - weights.b_V
        return torch.einsum("bthi,bthj->hij", v, v).double()

    def _solve_value_output(
        self, sums: Sums, weights: ValueOutputWeights, rank: int, *, constant: int, G: Tensor | None
    ) -> Solution:
        """Subspace P of each key head's values, and W_O for it, behind the norm where there is one.

        G: Gram matrices (H_kv, d, d) that say where the values are; None: those of the attention outputs.
        """
        num_heads, num_groups, d = len(weights.W_O), len(weights.W_V), weights.inner_size
        W_O = gained(weights.W_O.double(), sums.gain)
        if G is None:
            C = sums.whole.G[: num_heads * d, : num_heads * d]
            blocks = C.reshape(num_heads, d, num_heads, d).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            G = group_heads(blocks, num_groups).sum(dim=1)
        P, B, _, factor = product_svd(G, group_heads(W_O, num_groups), rank)
        ones = [torch.ones(1, 1, dtype=P.dtype, device=P.device)] * constant
        P_all = torch.block_diag(*P.repeat_interleave(num_heads // num_groups, dim=0), *ones)
        W_dense = torch.cat([W_O.flatten(0, 1), W_O.new_zeros(constant, W_O.shape[-1])])
        start = torch.cat([B.flatten(0, 2), B.new_zeros(constant, B.shape[-1])])
        kept: tuple[Tensor, Tensor, PSDFactor] = (P, P_all, factor)

        def reduce(moments: Moments) -> Moments:
            return moments.mapped(P_all)

        local = self.options.value_output == "attention"
        return Solution(kept, reduce, self._solve(sums.parts, W_dense, start, reduce, local=local))

    # 6.: MLP

    def _reduce_mlp(self, rank: int, targets: Targets, attention: Sequence[Tensor]) -> list[Tensor]:
        """``attention``: what the reduced attention adds to the stream. Returns what the reduced MLP gives."""
        weights, layer = read_mlp(self.family, self.layer), self.layer
        constant, gain = self._constant(weights.b_D), output_gain(self.family, layer, "mlp")
        taps: dict[str, Tap] = {"h": (self.family.down(layer), "input"), **self._middle_tap(layer)}
        sums = self._sums(len(weights.W_D) + constant, weights.W_D.shape[1], gain)
        known, read = known_attention(self.family, layer, attention), self.stored.batches()
        for seen in observe(layer, self.index, self.stream, taps, stop=True, known=[known]):
            t = self._mlp_target(seen, targets, attention)
            t = t if weights.b_D is None else t - weights.b_D
            sums.update(seen.batch, seen.seen["h"], t, constant=bool(constant))
            read.append(seen.seen["h"])
        sums.pool()
        aimed = replace(weights, W_D=gained(weights.W_D, gain))
        solution = self._solve_mlp(sums.parts, aimed, rank, constant=constant)
        kept, W = solution.kept, ungained(solution.refit.W, gain)
        b_D = self._with_constant(weights.b_D, W, constant)
        reduced = keep_mlp(weights, kept, W_D=W[:rank], b_D=b_D)
        self.reductions["mlp"] = Reduction(
            reduced,
            relative_error=self._error((sums, solution)),
            kept=kept,
            numerics=solution.refit.report(),
        )
        outputs = self.stored.batches()
        with forward():
            for h in read:
                outputs.append(nn.functional.linear(h[..., kept], reduced.W_D.T, reduced.b_D))
        return outputs

    def _mlp_target(self, seen: Observation, targets: Targets, attention: Sequence[Tensor]) -> Tensor:
        """What the MLP should add: what the dense one does, and a share of the error of the stream that it adds to."""
        error = targets.middle[seen.batch] - self._middle(seen, attention[seen.batch])
        return targets.mlp[seen.batch] + self.beta * error

    def _reduce_experts(self, rank: int, targets: Targets, attention: Sequence[Tensor]) -> None:
        """``_reduce_mlp`` for each expert, on the tokens that the router sends it behind the reduced attention.

        What all whole experts together leave of the target is shared out among a token's experts as the token is. An
        expert that saw few tokens is reduced with more of its own dense map, see ``decompositions/experts.py``.
        """
        experts: Any = self.family.experts(self.layer)
        weights = cast(ExpertWeights, read_mlps(self.family, self.layer)).experts
        of_each = [self._sums(len(each.W_D), each.W_D.shape[1]) for each in weights]
        taps: dict[str, Tap] = {side: (experts, side) for side in ARGUMENTS}
        known = known_attention(self.family, self.layer, attention)
        for seen in observe(self.layer, self.index, self.stream, taps, stop=True, known=[known]):
            x, chosen, shares = (seen.seen[side].flatten(0, 1) for side in ARGUMENTS)
            lacking, given = self._mlp_target(seen, targets, attention).flatten(0, 1), []
            routed = {index: of_one for index, *of_one in experts.routed(chosen, shares)}
            for index, expert in enumerate(weights):
                token, share = routed.get(index, (chosen.new_zeros(0), shares.new_zeros(0, 1)))
                with forward(), torch.no_grad():
                    h = experts[index].hidden(x[token], share)
                    added = h @ expert.W_D
                lacking = lacking.index_add(0, token, added, alpha=-1)
                given.append((token, share, h, added))
            lacking = lacking / shares.sum(dim=-1, keepdim=True)
            for sums, (token, share, h, added) in zip(of_each, given, strict=True):
                sums.update(seen.batch, h, added + share * lacking[token], tokens=token)
        for sums in of_each:
            sums.pool()
        jobs = (partial(self._solve_expert, sums, each, rank) for sums, each in zip(of_each, weights, strict=True))
        solved = self.walk.calibration.world.divided(jobs, x.device)
        reduced = [
            keep_mlp(each, solution.kept, W_D=solution.refit.W) for each, solution in zip(weights, solved, strict=True)
        ]
        counts = [sum(part.num_rows for part in sums.parts.values()) for sums in of_each]
        self.reductions["mlp"] = Reduction(
            ExpertWeights(tuple(reduced)),
            relative_error=self._error(*zip(of_each, solved, strict=True)),
            kept=torch.stack([solution.kept for solution in solved]),
            numerics=token_report(counts, len(weights[0].W_D))
            | {f"expert {index}": solution.refit.report() for index, solution in enumerate(solved)},
        )

    def _solve_expert(self, sums: Sums, weights: MLPWeights, rank: int) -> Solution:
        """``_solve_mlp`` with what the Gram of an expert is filled up with, aimed at its own dense map."""
        whole = sums.whole
        added = expert_gram(whole.G, weights, whole.num_rows) - whole.G
        filling = replace(whole, G=added, num_rows=0).aimed(weights.W_D.double())
        filled = {False: sums.parts[False] + filling, True: sums.parts[True]}
        return self._solve_mlp(filled, weights, rank, constant=0)

    def _solve_mlp(self, parts: Parts, weights: MLPWeights, rank: int, *, constant: int) -> Solution:
        """Channels to keep, and W_D for them."""
        n, d_h = weights.W_D.shape
        C = [parts[False].G[:n, :n] + parts[True].G[:n, :n]]  # which goes with its last reader
        if self.options.mlp == "elimination":
            removed, _ = eliminate(C.pop(), weights.W_D, rank, ridge=1e-6, block=128)
            kept = surviving(removed, n)
        else:
            kept = largest(ridge_leverage(C.pop(), 1e-2), rank)
        S = torch.cat([kept, torch.arange(n, n + constant, device=kept.device)])
        W_dense = torch.cat([weights.W_D.double(), weights.W_D.new_zeros(constant, d_h).double()])
        reduce = partial(Moments.kept, S=S)
        return Solution(kept, reduce, self._solve(parts, W_dense, W_dense[S], reduce, local=True))

    # 4. and 6.: the output solves

    def _constant(self, bias: Tensor | None) -> int:
        """1 where the regression has a constant feature, because there is a bias to put its coefficient in."""
        return int(self.options.bias == "own" and bias is not None)

    @staticmethod
    def _with_constant(bias: Tensor | None, W: Tensor, constant: int) -> Tensor | None:
        return bias if bias is None or not constant else (W[-1] + bias.double()).to(bias.dtype)

    def _sums(self, num_features: int, num_targets: int, gain: Tensor | None = None) -> Sums:
        device = next(self.layer.parameters()).device
        return Sums.zeros(self.walk.split, num_features, num_targets, device=device, gain=gain)

    @staticmethod
    def _error(*solved: tuple[Sums, Solution]) -> float:
        """Of all solutions together, relative to their targets' energy, over all tokens alike."""
        lost, energy = 0.0, torch.zeros(())
        for sums, solution in solved:
            whole = sums.whole
            lost += solution.reduce(whole).error(solution.refit.W)
            energy = energy + whole.energy
        return relative(torch.tensor(lost), energy)

    def _solve(
        self,
        parts: Parts,
        W_dense: Tensor,
        start: Tensor,
        reduce: Callable[[Moments], Moments],
        *,
        local: bool,
    ) -> Refit:
        """The output matrix for the features that ``reduce`` leaves.

        First, with ``local``, from ``start`` to what the dense map makes of the compressed stream's own features (at
        full rank that is ``start``). Then, with ``refit``, from there to the dense stream's target.
        """
        refit = Refit(start, start, float("inf"), (0.0, 0.0), {})
        if local and len(start) < len(W_dense):
            aimed = (reduce(parts[held].aimed(W_dense)) for held in (False, True))
            refit = held_out_refit(next(aimed), next(aimed), (start, start))
        if not self.options.refit:
            return refit
        return held_out_refit(reduce(parts[False]), reduce(parts[True]), (refit.fitted, refit.W))
