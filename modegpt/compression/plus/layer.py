"""One layer of the sequential pass: query-key, then value-output, then MLP, each on what the compressed stream makes of the ones before."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from modegpt.architectures import Family, LayerShape, build_layer, compressed_config, merged_tensors
from modegpt.calibration.statistics import rotate
from modegpt.calibration.stream import HiddenStates
from modegpt.compression.modegpt import READ, assemble_layer
from modegpt.compression.plus.query_key import QueryKeyChoice, candidates, choose
from modegpt.compression.plus.streams import Observation, Split, Tap, observe
from modegpt.compression.plus.switches import Switches
from modegpt.decompositions.attention import AttentionStates
from modegpt.decompositions.elimination import eliminate, surviving
from modegpt.decompositions.linalg import psd_cholesky, relative
from modegpt.decompositions.modules import Reduction, Weights
from modegpt.decompositions.nystrom import ridge_leverage
from modegpt.decompositions.regression import Moments, Refit, held_out_refit, ridge_towards
from modegpt.decompositions.selection import fold_value_bias, group_heads, keep_mlp, largest
from modegpt.decompositions.svd import balance, product_svd


RESCALING_RIDGES = (1e-2, 1e-1)
"""Ridges towards unscaled queries that compete on the held-out windows."""


@dataclass(frozen=True)
class Targets:
    """The dense stream at one layer, a tensor (batch, sequence, d_h) a batch: entering it, what attention adds, entering the MLP's sum, what the MLP adds."""

    x: list[Tensor]
    attention: list[Tensor]
    middle: list[Tensor]
    mlp: list[Tensor]


@dataclass
class LayerPass:
    """Reduces layer ``index``; ``stream`` is the compressed stream in front of it, ``targets`` the dense one.

    post_norm: the norms come after the sums (some OPT), so the MLP's own input is what enters its sum.
    """

    family: Family
    config: PreTrainedConfig
    layer: nn.Module
    index: int
    stream: HiddenStates
    split: Split
    options: Switches
    precision: torch.dtype
    generator: torch.Generator
    reductions: dict[str, Reduction] = field(default_factory=dict)

    @property
    def post_norm(self) -> bool:
        return not getattr(self.config, "do_layer_norm_before", True)

    @property
    def position_embeddings(self) -> tuple[Tensor, Tensor] | None:
        return next(iter(self.stream.arguments[self.index].values())).get("position_embeddings")

    def result(self) -> tuple[LayerShape, dict[str, Tensor], nn.Module]:
        """Shape, changed tensors and runnable layer of the reductions made so far."""
        shape, changed = assemble_layer(self.family, self.config, self.reductions)
        if not changed:
            return shape, changed, self.layer
        config = compressed_config(self.config, [shape] * self.config.num_hidden_layers)
        return shape, changed, build_layer(config, self.index, merged_tensors(self.family, self.layer, changed))

    def observed(self) -> nn.Module:
        """The layer whose activations the next module is reduced on."""
        return self.result()[2] if self.options.sequential and self.reductions else self.layer

    def middle_taps(self, layer: nn.Module) -> dict[str, Tap]:
        """What it takes to know the residual stream that the MLP's output is added to."""
        return {"middle": (self.family.up(layer), "input")} if self.post_norm else {"attention": (self.family.output(layer), "output")}

    def middle(self, seen: Observation) -> Tensor:
        return seen.seen["middle"] if self.post_norm else seen.x + seen.seen["attention"]

    def dense_targets(self, dense: HiddenStates) -> Targets:
        """Run the dense layer on the dense stream, which moves on."""
        family, layer = self.family, self.layer
        taps = {"attention": (family.output(layer), "output"), "mlp": (family.down(layer), "output"), **self.middle_taps(layer)}
        targets = Targets([], [], [], [])
        for seen in observe(layer, self.index, dense, taps, stop=False):
            targets.x.append(seen.x)
            targets.attention.append(seen.seen["attention"])
            targets.middle.append(self.middle(seen))
            targets.mlp.append(seen.seen["mlp"])
            dense.batches[seen.batch] = seen.output
        return targets

    def reduce(self, ranks: Mapping[str, int], dense: HiddenStates, *, refit_whole: bool) -> None:
        """Reduce the modules in the order of the forward pass; the dense stream moves on.

        A module at full rank is left alone, or with ``refit_whole`` has its output matrix solved like the others': it corrects what came before.
        """
        targets = self.dense_targets(dense)
        if ranks["query_key"] < self.read("query_key").inner_size:
            self.reduce_query_key(ranks["query_key"])
        for module, reduce in (("value_output", self.reduce_value_output), ("mlp", self.reduce_mlp)):
            if refit_whole or ranks[module] < self.read(module).inner_size:
                reduce(ranks[module], targets)

    def read(self, module: str) -> Weights:
        return READ[module](self.family, self.layer)

    # query-key

    def reduce_query_key(self, rank: int) -> None:
        weights = self.read("query_key")
        C_Q, C_K, fit, held = self._attention_states()
        ridges = RESCALING_RIDGES if self.options.query_key == "rescaled" else ()
        found = candidates(weights, C_Q, C_K, fit, rank, ridges=ridges, improved=self.options.query_key != "paper")
        choice: QueryKeyChoice = choose(weights, found, held)
        counts = {name: choice.names.count(name) for name in dict.fromkeys(choice.names)}
        numerics: dict[str, Any] = {"chosen": counts, "held_out": choice.held_out}
        self.reductions["query_key"] = Reduction(choice.weights, relative_error=choice.relative_error, numerics=numerics)

    def _attention_states(self) -> tuple[Tensor, Tensor, list[AttentionStates], list[AttentionStates]]:
        """C_Q (H, d, d), C_K (H_kv, d, d) over all windows, and sampled attention states of fitting and of held-out windows."""
        family, layer = self.family, self.layer
        attention = family.attention(layer)
        taps = {"q": (family.query(layer), "output"), "k": (family.key(layer), "output"), "v": (family.value(layer), "output")}
        W_O = self.read("value_output").W_O.double()
        metric = psd_cholesky(W_O @ W_O.mT).root()
        C_Q = C_K = None
        states: tuple[list[AttentionStates], list[AttentionStates]] = ([], [])
        left = [self.options.query_key_windows] * 2
        for seen in observe(layer, self.index, self.stream, taps, stop=True):
            q, k, v = (seen.seen[name].unflatten(-1, (-1, attention.head_dim)) for name in "qkv")
            q, k = rotate(family.normalise_query(layer, q), self.position_embeddings), rotate(family.normalise_key(layer, k), self.position_embeddings)
            for_batch = [torch.einsum("bthi,bthj->hij", s.to(self.precision), s.to(self.precision)).double() for s in (q, k)]
            C_Q, C_K = for_batch if C_Q is None else (C_Q + for_batch[0], C_K + for_batch[1])
            v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2).transpose(1, 2) @ metric.to(v.dtype)
            positions = self._positions(q.shape[1])
            bias = self._attention_bias(seen.x, positions)
            for held in (False, True):
                windows = self.split.windows(seen.batch, held=held)[: left[held]].to(q.device)
                if len(windows):
                    left[held] -= len(windows)
                    queries = q[windows][:, positions.to(q.device)].transpose(1, 2) * attention.scaling
                    own_bias = bias if len(bias) == 1 else bias[windows]
                    states[held].append(AttentionStates(q=queries, k=k[windows].transpose(1, 2), v=v[windows], bias=own_bias))
        return C_Q, C_K, *states

    def _positions(self, length: int) -> Tensor:
        """Sampled query positions; the first token attends to itself alone and shows nothing."""
        order = torch.randperm(length - 1, generator=self.generator)[: self.options.queries_per_window] + 1
        return order.sort().values

    def _attention_bias(self, x: Tensor, positions: Tensor) -> Tensor:
        """(1 or batch, 1, t, s): 0 where the sampled queries may attend, -inf elsewhere."""
        length = x.shape[1]
        mask = self.stream.layer_arguments(self.index, x).get("attention_mask")
        if mask is not None and mask.ndim == 4:
            allowed = mask if mask.dtype == torch.bool else mask >= 0
            allowed = allowed[:, :, positions.to(x.device), :length]
        else:
            allowed = (torch.arange(length) <= positions.unsqueeze(1))[None, None].to(x.device)
        return torch.zeros(allowed.shape, dtype=x.dtype, device=x.device).masked_fill(~allowed, float("-inf"))

    # value-output

    def reduce_value_output(self, rank: int, targets: Targets) -> None:
        weights = self.read("value_output")
        num_groups, d = len(weights.W_V), weights.inner_size
        num_heads, group_size = len(weights.W_O), len(weights.W_O) // num_groups
        folded = fold_value_bias(weights)
        b_V = None if weights.b_V is None else weights.b_V.repeat_interleave(group_size, dim=0).flatten()
        constant = self._constant(weights.b_O if weights.b_V is None else folded)
        layer = self.observed()
        taps = {"states": (self.family.output(layer), "input")}
        G = None
        if self.options.value_output == "values":
            taps["values"] = (self.family.value(layer), "output")
        parts = self._moments(num_heads * d + constant, weights.W_O.shape[-1])
        for seen in observe(layer, self.index, self.stream, taps, stop=True):
            z = seen.seen["states"] if b_V is None else seen.seen["states"] - b_V
            t = targets.attention[seen.batch] + self.options.beta * (targets.x[seen.batch] - seen.x)
            self._update(parts, seen.batch, z, t if folded is None else t - folded, constant)
            if "values" in taps:
                v = seen.seen["values"].unflatten(-1, (-1, d)).to(self.precision)
                v = v if weights.b_V is None else v - weights.b_V
                of_batch = torch.einsum("bthi,bthj->hij", v, v).double()
                G = of_batch if G is None else G + of_batch
        whole = parts[False] + parts[True]
        W_O = weights.W_O.double()
        if G is None:
            blocks = whole.G[: num_heads * d, : num_heads * d].reshape(num_heads, d, num_heads, d)
            G = group_heads(blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1), num_groups).sum(dim=1)
        P, B, _, factor = product_svd(G, group_heads(W_O, num_groups), rank)
        P_all = torch.block_diag(*P.repeat_interleave(group_size, dim=0), *([torch.ones(1, 1, dtype=P.dtype, device=P.device)] * constant))
        W_dense = torch.cat([W_O.flatten(0, 1), W_O.new_zeros(constant, W_O.shape[-1])])
        start = torch.cat([B.flatten(0, 2), B.new_zeros(constant, B.shape[-1])])
        refit = self._solve(parts, W_dense, start, lambda moments: moments.mapped(P_all), local=self.options.value_output == "attention")
        W_V, B = balance(weights.W_V.double() @ P, refit.W[: num_heads * rank].unflatten(0, (num_groups, group_size, rank)))
        b_O = self._with_constant(folded, refit.W, constant, weights.W_O.dtype)
        reduced = type(weights)(W_V=W_V.to(weights.W_V.dtype), W_O=B.flatten(0, 1).to(weights.W_O.dtype), b_V=None, b_O=b_O)
        error = relative(torch.tensor(whole.mapped(P_all).error(refit.W)), whole.energy)
        self.reductions["value_output"] = Reduction(reduced, relative_error=error, numerics=factor.numerics | _report(refit))

    # MLP

    def reduce_mlp(self, rank: int, targets: Targets) -> None:
        weights = self.read("mlp")
        n, d_h = weights.W_D.shape
        constant = self._constant(weights.b_D)
        layer = self.observed()
        taps = {"h": (self.family.down(layer), "input"), **self.middle_taps(layer)}
        parts = self._moments(n + constant, d_h)
        for seen in observe(layer, self.index, self.stream, taps, stop=True):
            t = targets.mlp[seen.batch] + self.options.beta * (targets.middle[seen.batch] - self.middle(seen))
            self._update(parts, seen.batch, seen.seen["h"], t if weights.b_D is None else t - weights.b_D, constant)
        whole = parts[False] + parts[True]
        W_D = torch.cat([weights.W_D.double(), weights.W_D.new_zeros(constant, d_h).double()])
        if self.options.mlp == "elimination":
            removed, _ = eliminate(whole.G[:n, :n], weights.W_D, rank, ridge=1e-6, block=128)
            kept = surviving(removed, n)
        else:
            kept = largest(ridge_leverage(whole.G[:n, :n], 1e-2), rank)
        S = torch.cat([kept, torch.arange(n, n + constant, device=kept.device)])
        refit = self._solve(parts, W_D, W_D[S], lambda moments: moments.kept(S), local=True)
        b_D = self._with_constant(weights.b_D, refit.W, constant, weights.W_D.dtype)
        error = relative(torch.tensor(whole.kept(S).error(refit.W)), whole.energy)
        self.reductions["mlp"] = Reduction(keep_mlp(weights, kept, W_D=refit.W[:rank], b_D=b_D), relative_error=error, kept=kept, numerics=_report(refit))

    # both

    def _constant(self, bias: Tensor | None) -> int:
        """1 where the regression has a constant feature, because there is a bias to put its coefficient in."""
        return int(self.options.bias == "added" or (self.options.bias == "own" and bias is not None))

    @staticmethod
    def _with_constant(bias: Tensor | None, W: Tensor, constant: int, dtype: torch.dtype) -> Tensor | None:
        if not constant:
            return bias
        return (W[-1] if bias is None else W[-1] + bias.double()).to(dtype)

    def _moments(self, num_features: int, num_targets: int) -> dict[bool, Moments]:
        device = self.stream.batches[0].device
        return {held: Moments.zeros(num_features, num_targets, device=device) for held in (False, True)}

    def _update(self, parts: dict[bool, Moments], batch: int, z: Tensor, t: Tensor, constant: int) -> None:
        if constant:
            z = torch.cat([z, z.new_ones(*z.shape[:2], 1)], dim=-1)
        for held, rows in self.split.parts(batch, z, t):
            parts[held] = parts[held].updated(*rows, precision=self.precision)

    def _solve(self, parts: dict[bool, Moments], W_dense: Tensor, start: Tensor, reduce: Callable[[Moments], Moments], *, local: bool) -> Refit:
        """First the dense map on the compressed stream's own features (with ``local``), then, from there, the dense stream's target."""
        fit, held = parts[False], parts[True]
        starts = (start, start)
        refit = Refit(start, float("inf"), (0.0, 0.0), {})
        if local:
            aim = [reduce(part.aimed(W_dense)) for part in (fit, held)]
            refit = held_out_refit(*aim, starts)
            ridge = refit.ridge
            starts = (start if ridge == float("inf") else ridge_towards(aim[0], start, ridge)[0], refit.W)
        return held_out_refit(reduce(fit), reduce(held), starts) if self.options.refit else refit


def _report(refit: Refit) -> dict[str, Any]:
    ridge = "kept the start" if refit.ridge == float("inf") else refit.ridge
    return {"ridge": ridge, "held_out": list(refit.held_out), **refit.numerics}
