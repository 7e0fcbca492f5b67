"""One layer of the sequential pass: query-key, then value-output, then MLP, each on what the compressed stream makes of the ones before."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from modegpt.calibration.stream import HiddenStates
from modegpt.decompositions.elimination import eliminate, surviving
from modegpt.decompositions.linalg import PSDFactor, relative
from modegpt.decompositions.modules import Reduction, Weights
from modegpt.decompositions.nystrom import ridge_leverage
from modegpt.decompositions.regression import Moments, Refit, held_out_refit
from modegpt.decompositions.selection import fold_value_bias, group_heads, keep_mlp, largest
from modegpt.decompositions.svd import balance, product_svd
from modegpt.methods.modegpt import READ, assemble_layer
from modegpt.methods.plus.attention_states import sample
from modegpt.methods.plus.query_key import QueryKeyChoice, candidates, choose
from modegpt.methods.plus.streams import Observation, Split, Tap, observe
from modegpt.methods.plus.sums import Parts, Solution, Sums, best
from modegpt.methods.plus.switches import Switches
from modegpt.models import Family, LayerShape, build_layer, compressed_config, merged_tensors

RESCALING_RIDGES = (1e-2, 1e-1)
"""Ridges towards unscaled queries that compete on the held-out windows."""


@dataclass(frozen=True)
class Targets:
    """What the output solves aim at, a tensor (batch, sequence, d_h) a batch.

    attention: what the dense attention adds, and ``beta`` times the error of the stream in front; mlp: what the dense MLP adds; middle: to
    which dense stream, the error of whose compressed form is not known yet.
    """

    attention: list[Tensor]
    mlp: list[Tensor]
    middle: list[Tensor]
    attention_input: list[Tensor]
    mlp_input: list[Tensor]


@dataclass
class LayerPass:
    """Reduces layer ``index``; ``stream`` is the compressed stream in front of it, ``moved`` whether it differs from the dense one.
    ``dense_config`` is ``compressed_config`` of the model's ``config`` at full sizes.

    fisher: for the output solves of ``value_output`` and ``mlp``, what a change of each token's output does to the loss, (batch, sequence) a batch.
    aligned: input maps of full size, refitted to what the compressed stream makes of the layer's inputs; ``layer`` then has them.
    post_norm: the norms come after the sums (some OPT), so the MLP's own input is what enters its sum.
    """

    family: Family
    config: PreTrainedConfig
    dense_config: PreTrainedConfig
    layer: nn.Module
    index: int
    stream: HiddenStates
    split: Split
    options: Switches
    precision: torch.dtype
    generator: torch.Generator
    moved: bool
    fisher: Mapping[str, Sequence[Tensor]] | None = None
    reductions: dict[str, Reduction] = field(default_factory=dict)
    aligned: dict[str, Tensor] = field(default_factory=dict)
    alignment: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def post_norm(self) -> bool:
        return not getattr(self.config, "do_layer_norm_before", True)

    def result(self) -> tuple[LayerShape, dict[str, Tensor], nn.Module]:
        """Shape, changed tensors and runnable layer of the reductions made so far."""
        shape, changed = assemble_layer(self.family, self.config, self.reductions)
        changed = self.aligned | changed
        if not changed:
            return shape, changed, self.layer
        config = compressed_config(self.config, [shape] * self.config.num_hidden_layers)
        return shape, changed, build_layer(config, self.index, merged_tensors(self.family, self.layer, changed))

    def reduce(self, ranks: Mapping[str, int], dense: HiddenStates) -> tuple[LayerShape, dict[str, Tensor]]:
        """Reduce the modules in the order of the forward pass; both streams move on. Returns the layer's shape and changed tensors.

        A module at full rank is left alone until the stream has moved, and then has its output matrix solved like the others', where
        ``refit`` says so: it corrects what came before.
        """
        family, options = self.family, self.options
        targets, dense_attention = self._dense_targets(dense)
        if options.align and self.moved:
            self._align("attention", targets.attention_input, (family.query_path, family.key_path, family.value_path))
        if ranks["query_key"] < self.read("query_key").inner_size:
            self.reduce_query_key(ranks["query_key"])
        refitted = options.refit and self.moved
        wanted = {
            module for module in ("value_output", "mlp") if refitted or ranks[module] < self.read(module).inner_size
        }
        attention = self.reduce_value_output(ranks["value_output"], targets) if "value_output" in wanted else None
        if not options.sequential:
            attention = dense_attention
        elif attention is None:
            attention = self._attention_outputs()
        if options.align and (self.moved or self.reductions):
            self._align(
                "mlp", targets.mlp_input, (*([family.gate_path] if family.gate_path else []), family.up_path), attention
            )
        if "mlp" in wanted:
            self.reduce_mlp(ranks["mlp"], targets, attention)
        shape, changed, reduced = self.result()
        if options.sequential:
            self._advance(reduced, attention)
        return shape, changed

    def _align(
        self, name: str, dense_inputs: list[Tensor], paths: tuple[str, ...], attention: Sequence[Tensor] | None = None
    ) -> None:
        """Refit the input maps ``paths`` of ``layer`` to the dense ones' outputs: ``W <- A W``, ``A = argmin ||x~ A - x||^2`` near the identity.

        x~ and x are the compressed and the dense stream after the norm, so one A (d_h, d_h) serves all maps that read them. The layer runs up to
        the first of ``paths``, which had better be the first that it applies.
        """
        layer = self.layer
        taps = {"x": (layer.get_submodule(paths[0]), "input")}
        size = dense_inputs[0].shape[-1]
        sums = self._sums(size, size)
        given = None if attention is None else (self.family.attention(layer), attention)
        for seen in observe(layer, self.index, self.stream, taps, stop=True, attention=given):
            sums.update(seen.batch, seen.seen["x"], dense_inputs[seen.batch])
        identity = torch.eye(size, dtype=torch.float64, device=dense_inputs[0].device)
        refit = held_out_refit(sums.plain[False], sums.plain[True], (identity, identity))
        self.alignment[name] = refit.report()
        for path in paths:
            linear = layer.get_submodule(path)
            self.aligned[f"{path}.weight"] = (linear.weight.double() @ refit.W.mT).to(linear.weight.dtype)
            if linear.bias is not None:
                self.aligned[f"{path}.bias"] = linear.bias.detach()
        self.layer = build_layer(self.dense_config, self.index, merged_tensors(self.family, layer, self.aligned))

    def read(self, module: str) -> Weights:
        return READ[module](self.family, self.layer)

    def _dense_targets(self, dense: HiddenStates) -> tuple[Targets, list[Tensor]]:
        """Run the dense layer on the dense stream, which moves on; also returns what its attention adds."""
        family, layer, beta = self.family, self.layer, self.options.beta
        taps = {
            "attention": (family.output(layer), "output"),
            "mlp": (family.down(layer), "output"),
            **self._middle_tap(layer),
        }
        if self.options.align:
            taps |= {"attention_input": (family.query(layer), "input"), "mlp_input": (family.up(layer), "input")}
        targets, attention = Targets([], [], [], [], []), []
        for seen in observe(layer, self.index, dense, taps, stop=False):
            added = seen.seen["attention"]
            attention.append(added)
            targets.attention.append(added + beta * (seen.x - self.stream.batches[seen.batch]))
            targets.mlp.append(seen.seen["mlp"])
            targets.middle.append(self._middle(seen, added))
            if self.options.align:
                targets.attention_input.append(seen.seen["attention_input"])
                targets.mlp_input.append(seen.seen["mlp_input"])
            dense.batches[seen.batch] = seen.output
        return targets, attention

    def _middle_tap(self, layer: nn.Module) -> dict[str, Tap]:
        return {"middle": (self.family.up(layer), "input")} if self.post_norm else {}

    def _middle(self, seen: Observation, attention: Tensor) -> Tensor:
        """The residual stream that the MLP's output is added to."""
        return seen.seen["middle"] if self.post_norm else seen.x + attention

    def _attention_outputs(self) -> list[Tensor]:
        """What the attention as reduced so far adds to the compressed stream."""
        layer = self.result()[2]
        taps = {"attention": (self.family.output(layer), "output")}
        return [seen.seen["attention"] for seen in observe(layer, self.index, self.stream, taps, stop=True)]

    def _advance(self, reduced: nn.Module, attention: Sequence[Tensor]) -> None:
        given = (self.family.attention(reduced), attention)
        for seen in observe(reduced, self.index, self.stream, {}, stop=False, attention=given):
            assert torch.isfinite(seen.output).all(), (
                f"layer {self.index}: activations of the compressed model are not finite"
            )
            self.stream.batches[seen.batch] = seen.output

    # query-key

    def reduce_query_key(self, rank: int) -> None:
        weights, options = self.read("query_key"), self.options
        states = sample(
            self.family,
            self.layer,
            self.index,
            self.stream,
            self.split,
            num_windows=options.query_key_windows,
            queries_per_window=options.queries_per_window,
            precision=self.precision,
            generator=self.generator,
        )
        ridges = RESCALING_RIDGES if options.query_key == "rescaled" else ()
        found = candidates(
            weights, states, rank, ridges=ridges, improved=options.query_key != "paper", centred=options.centred
        )
        choice: QueryKeyChoice = choose(weights, found, states.held)
        counts = {name: choice.names.count(name) for name in dict.fromkeys(choice.names)}
        numerics: dict[str, Any] = {"chosen": counts, "held_out": choice.held_out}
        self.reductions["query_key"] = Reduction(
            choice.weights, relative_error=choice.relative_error, numerics=numerics
        )

    # value-output

    def reduce_value_output(self, rank: int, targets: Targets) -> list[Tensor]:
        """Returns what the reduced attention adds to the stream."""
        weights = self.read("value_output")
        num_groups, d = len(weights.W_V), weights.inner_size
        num_heads, group_size = len(weights.W_O), len(weights.W_O) // num_groups
        folded = fold_value_bias(weights)
        b_V = None if weights.b_V is None else weights.b_V.repeat_interleave(group_size, dim=0).flatten()
        constant = self._constant(weights.b_O if weights.b_V is None else folded)
        layer = self.result()[2] if self.options.sequential else self.layer
        taps = {"states": (self.family.output(layer), "input")}
        G = None
        if self.options.value_output == "values":
            taps["values"] = (self.family.value(layer), "output")
        sums, read = self._sums(num_heads * d + constant, weights.W_O.shape[-1], "value_output"), []
        for seen in observe(layer, self.index, self.stream, taps, stop=True):
            z = seen.seen["states"] if b_V is None else seen.seen["states"] - b_V
            t = targets.attention[seen.batch]
            sums.update(seen.batch, z, t if folded is None else t - folded, constant=bool(constant))
            read.append(z)
            if "values" in taps:
                v = seen.seen["values"].unflatten(-1, (-1, d)).to(self.precision)
                v = v if weights.b_V is None else v - weights.b_V
                of_batch = torch.einsum("bthi,bthj->hij", v, v).double()
                G = of_batch if G is None else G + of_batch
        W_O = weights.W_O.double()
        W_dense = torch.cat([W_O.flatten(0, 1), W_O.new_zeros(constant, W_O.shape[-1])])

        def solve(parts: Parts) -> tuple[tuple[Tensor, Tensor, PSDFactor], Callable[[Moments], Moments], Refit]:
            C = G
            if C is None:
                blocks = (
                    (parts[False] + parts[True]).G[: num_heads * d, : num_heads * d].reshape(num_heads, d, num_heads, d)
                )
                C = group_heads(blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1), num_groups).sum(dim=1)
            P, B, _, factor = product_svd(C, group_heads(W_O, num_groups), rank)
            P_all = torch.block_diag(
                *P.repeat_interleave(group_size, dim=0),
                *([torch.ones(1, 1, dtype=P.dtype, device=P.device)] * constant),
            )
            start = torch.cat([B.flatten(0, 2), B.new_zeros(constant, B.shape[-1])])

            def reduce(moments: Moments) -> Moments:
                return moments.mapped(P_all)

            return (
                (P, P_all, factor),
                reduce,
                self._solve(parts, W_dense, start, reduce, local=self.options.value_output == "attention"),
            )

        solution = best(sums, self.options.gammas, solve)
        (P, P_all, factor), refit = solution.kept, solution.refit
        W_V, B = balance(
            weights.W_V.double() @ P, refit.W[: num_heads * rank].unflatten(0, (num_groups, group_size, rank))
        )
        b_O = self._with_constant(folded, refit.W, constant, weights.W_O.dtype)
        reduced = type(weights)(
            W_V=W_V.to(weights.W_V.dtype), W_O=B.flatten(0, 1).to(weights.W_O.dtype), b_V=None, b_O=b_O
        )
        self.reductions["value_output"] = Reduction(
            reduced, relative_error=self._error(sums, solution), numerics=factor.numerics | solution.numerics
        )
        whole_map = (P_all @ refit.W)[: num_heads * d].to(weights.W_O.dtype)
        return [z @ whole_map if b_O is None else z @ whole_map + b_O for z in read]

    # MLP

    def reduce_mlp(self, rank: int, targets: Targets, attention: Sequence[Tensor]) -> None:
        """``attention``: what the reduced attention adds to the stream."""
        weights = self.read("mlp")
        n, d_h = weights.W_D.shape
        constant = self._constant(weights.b_D)
        layer = self.layer
        taps = {"h": (self.family.down(layer), "input"), **self._middle_tap(layer)}
        sums = self._sums(n + constant, d_h, "mlp")
        for seen in observe(
            layer, self.index, self.stream, taps, stop=True, attention=(self.family.attention(layer), attention)
        ):
            t = targets.mlp[seen.batch] + self.options.beta * (
                targets.middle[seen.batch] - self._middle(seen, attention[seen.batch])
            )
            sums.update(
                seen.batch, seen.seen["h"], t if weights.b_D is None else t - weights.b_D, constant=bool(constant)
            )
        W_D = torch.cat([weights.W_D.double(), weights.W_D.new_zeros(constant, d_h).double()])

        def solve(parts: Parts) -> tuple[Tensor, Callable[[Moments], Moments], Refit]:
            C = (parts[False] + parts[True]).G[:n, :n]
            if self.options.mlp == "elimination":
                removed, _ = eliminate(C, weights.W_D, rank, ridge=1e-6, block=128)
                kept = surviving(removed, n)
            else:
                kept = largest(ridge_leverage(C, 1e-2), rank)
            S = torch.cat([kept, torch.arange(n, n + constant, device=kept.device)])

            def reduce(moments: Moments) -> Moments:
                return moments.kept(S)

            return kept, reduce, self._solve(parts, W_D, W_D[S], reduce, local=True)

        solution = best(sums, self.options.gammas, solve)
        kept, refit = solution.kept, solution.refit
        b_D = self._with_constant(weights.b_D, refit.W, constant, weights.W_D.dtype)
        reduced = keep_mlp(weights, kept, W_D=refit.W[:rank], b_D=b_D)
        self.reductions["mlp"] = Reduction(
            reduced, relative_error=self._error(sums, solution), kept=kept, numerics=solution.numerics
        )

    # both

    def _constant(self, bias: Tensor | None) -> int:
        """1 where the regression has a constant feature, because there is a bias to put its coefficient in."""
        return int(self.options.bias == "added" or (self.options.bias == "own" and bias is not None))

    @staticmethod
    def _with_constant(bias: Tensor | None, W: Tensor, constant: int, dtype: torch.dtype) -> Tensor | None:
        if not constant:
            return bias
        return (W[-1] if bias is None else W[-1] + bias.double()).to(dtype)

    def _sums(self, num_features: int, num_targets: int, module: str | None = None) -> Sums:
        """For the output solve of ``module``, weighted by the loss where that is asked for, or for another regression."""
        fisher = None if module is None or self.fisher is None else self.fisher[module]
        return Sums.zeros(
            self.split,
            num_features,
            num_targets,
            device=self.stream.batches[0].device,
            precision=self.precision,
            fisher=fisher,
        )

    @staticmethod
    def _error(sums: Sums, solution: Solution) -> float:
        """Relative to the target's energy, over all tokens alike."""
        whole = sums.plain[False] + sums.plain[True]
        return relative(torch.tensor(solution.reduce(whole).error(solution.refit.W)), whole.energy)

    def _solve(
        self, parts: Parts, W_dense: Tensor, start: Tensor, reduce: Callable[[Moments], Moments], *, local: bool
    ) -> Refit:
        """First the dense map on the compressed stream's own features (with ``local``; at full rank it is ``start``), then, from there, the dense stream's target."""
        refit = Refit(start, start, float("inf"), (0.0, 0.0), {})
        if local and len(start) < len(W_dense):
            refit = held_out_refit(*(reduce(parts[held].aimed(W_dense)) for held in (False, True)), (start, start))
        if not self.options.refit:
            return refit
        return held_out_refit(reduce(parts[False]), reduce(parts[True]), (refit.fitted, refit.W))
