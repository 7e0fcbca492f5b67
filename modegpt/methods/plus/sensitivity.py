"""How much each module's reduction moves the model's predictions, measured; and what every rank would cost by that."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modegpt.calibration.cache import StatisticsCache
from modegpt.calibration.calibration import Calibration
from modegpt.calibration.statistics import Statistics
from modegpt.calibration.stream import HiddenStates, advance, embed, layers_replaced
from modegpt.cost.work import Alike
from modegpt.data.tokens import CalibrationTokens
from modegpt.decompositions.curves import mlp_curve, query_key_curve, value_output_curve
from modegpt.decompositions.head_norm import keep_head_norms
from modegpt.decompositions.modules import HEAD_NORM_FIT, HeadNorm
from modegpt.decompositions.nystrom import refit
from modegpt.decompositions.selection import group_heads
from modegpt.files import json_sha256
from modegpt.models import Family, decoder_layers, read_mlp, read_query_key, read_value_output
from modegpt.models.modeling_modegpt import normed_heads

Costs = list[dict[str, list[float]]]
"""costs[layer][module][k]: what removing k of a module's dims is expected to cost."""

ENOUGH_TOKENS, FEWEST_TOKENS = 1024, 256
"""Divergences are measured on about so many calibration tokens; on fewer where that would cost more than two passes
over all, but not on fewer than so many."""

MOST_ENTRIES, FEWEST_PREDICTIONS = 2**21, 128
"""So many log probabilities are compared a measurement (1365 predictions over 1536 tokens, 128 over 49152), at no fewer
positions than that."""

TOKENS_PER_CHANNEL = 4
"""Closed-form errors come from so many tokens for each MLP channel, or from a quarter of all where that is more."""


StandIns = list[tuple[nn.Module, Callable[[Tensor], Tensor]]]


@dataclass(frozen=True)
class Prospect:
    """What one module would lose.

    Args:
        unit: dims that go together.
        curve: squared error of removing k of its dims, k = 0 ... size.
        map: from k to what acts as if k were removed: modules of the dense layer, each with another forward at its full
            size.
    """

    unit: int
    curve: list[float]
    map: Callable[[int], "StandIns"]

    @property
    def size(self) -> int:
        """Dims of the module."""
        return len(self.curve) - 1

    def removed(self, share: float) -> int:
        """The number of dims nearest to ``share`` that can be removed: not none, and not all."""
        kept = min(max(round((1 - share) * self.size / self.unit), 1) * self.unit, self.size - self.unit)
        return self.size - kept


def mlp_prospect(family: Family, layer: nn.Module, statistics: Statistics) -> Prospect:
    """Channels by backward elimination, with the down projection refitted."""
    weights, C = read_mlp(family, layer), statistics["mlp.C"]
    curve, order = mlp_curve(C, weights.W_D)

    def lifted(removed: int) -> StandIns:
        kept = order[removed:].sort().values
        W_D = torch.zeros_like(weights.W_D, dtype=_exact(weights.W_D)).index_copy(
            0, kept, refit(C, weights.W_D, kept)[0].to(_exact(weights.W_D))
        )
        return [(family.down(layer), _linear(W_D.T, weights.b_D))]

    return Prospect(1, curve.tolist(), lifted)


def value_output_prospect(family: Family, layer: nn.Module, statistics: Statistics) -> Prospect:
    """Truncations of the value-output product, in the output projection."""
    weights = read_value_output(family, layer)
    A = statistics.get("value_output.A")
    G = statistics["value_output.G"] if A is None else group_heads(A, len(weights.W_V)).sum(dim=1)
    curve, P, B = value_output_curve(G, weights.W_O)

    def lifted(removed: int) -> StandIns:
        rank = P.shape[-1] - removed
        W_O = (P[..., :rank].unsqueeze(1) @ B[:, :, :rank]).flatten(0, 1).to(_exact(weights.W_O))
        b_O = weights.b_O
        if weights.b_V is not None:  # the value bias passes whole, see fold_value_bias
            lost = torch.einsum(
                "hd,hdm->m",
                weights.b_V.to(W_O.dtype).repeat_interleave(len(W_O) // len(weights.b_V), dim=0),
                weights.W_O - W_O,
            )
            b_O = lost if b_O is None else b_O + lost
        return [(family.output(layer), _linear(W_O.flatten(0, 1).T, b_O))]

    return Prospect(1, curve.tolist(), lifted)


def query_key_prospect(family: Family, layer: nn.Module, statistics: Statistics) -> Prospect:
    """Rotary pairs, or dims, by the paper's score, set to zero in the key projection; where heads have norms, behind
    these, which are the estimates that the heads would get.
    """
    weights = read_query_key(family, layer)
    curve, order = query_key_curve(statistics["query_key.C_Q"], statistics["query_key.C_K"], rope=weights.rope)
    unit = weights.rank_unit

    def normed(removed: int) -> StandIns:
        kept = order[:, removed // unit :].sort(dim=1).values
        norms, _ = keep_head_norms(weights, kept, statistics, fit=HEAD_NORM_FIT)
        group = len(weights.W_Q) // len(weights.W_K)
        return [
            (layer.get_submodule(path), _full_norm(family, norms[name], pairs, weights.inner_size))
            for path, name, pairs in (
                (family.query_norm_path, "norm_Q", kept.repeat_interleave(group, dim=0)),
                (family.key_norm_path, "norm_K", kept),
            )
            if path is not None
        ]

    def lifted(removed: int) -> StandIns:
        if family.head_norms:
            return normed(removed)
        gone = (
            torch.zeros_like(order, dtype=torch.bool)
            .scatter(1, order[:, : removed // unit], True)
            .repeat(1, unit)
            .flatten()
        )
        key = family.key(layer)
        bias = None if key.bias is None else key.bias.masked_fill(gone, 0.0)
        return [(key, _linear(key.weight.masked_fill(gone.unsqueeze(1), 0.0), bias))]

    # a dim that splits a rotary pair costs what the pair costs
    return Prospect(unit, [curve[-(-k // unit)].item() for k in range(weights.inner_size + 1)], lifted)


def _linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A linear map of ``weight`` (out, in), in float32 at least."""
    weight, bias = weight.to(_exact(weight)), None if bias is None else bias.to(_exact(bias))
    return lambda x: nn.functional.linear(x, weight, bias)


def _full_norm(family: Family, norm: HeadNorm, pairs: Tensor, size: int) -> Callable[[Tensor], Tensor]:
    """The ``norm`` of heads that keep ``pairs`` (H, k), on states of the full ``size``; the other dims become zero."""
    dims = torch.cat([pairs, pairs + size // 2], dim=1)
    w, c = (part.new_zeros(len(pairs), size).scatter(1, dims, part) for part in (norm.w, norm.c))

    def forward(states: Tensor) -> Tensor:
        shape, rows = states.shape, states.transpose(-2, -3) if family.heads_first else states
        rows = rows.reshape(*rows.shape[: 2 if family.joint_norms else -2], len(pairs), size)
        rows = normed_heads(rows, *(part.to(rows.dtype) for part in (w, c, norm.eps)), joint=family.joint_norms)
        return rows.transpose(-2, -3) if family.heads_first else rows.reshape(shape)

    return forward


def _exact(tensor: Tensor) -> torch.dtype:
    """Float32, or the dtype of ``tensor`` where that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


PROSPECTS = {"mlp": mlp_prospect, "query_key": query_key_prospect, "value_output": value_output_prospect}


def rank_costs(
    calibration: Calibration,
    modules: Mapping[str, frozenset[str]],
    shares: tuple[float, ...],
    skip_layers: tuple[int, ...],
) -> Costs:
    """costs[layer][module][k]: KL divergence expected from removing k dims of that module alone.

    Each of ``modules`` (with the statistics it needs) loses each share in ``shares`` of its dims (closed form,
    statistics of the dense stream), the rest of the model runs dense on a few calibration windows, and the divergence
    from the dense model's predictions is measured, in float32 whatever the model's dtype; ``expected`` carries it to
    all ranks. One statistics pass over a quarter of the windows (more where they are short of ``TOKENS_PER_CHANNEL``),
    and ``3 L^2 / 2`` layer passes a share over ``measured_windows``; no evaluation data, no gradient.
    """
    model, ids = calibration.model, calibration.tokens.ids
    layers = decoder_layers(model)
    measured = measured_windows(ids, num_layers=len(layers), num_shares=len(shares))
    batches = [batch.to(model.device) for batch in measured.split(calibration.batch_size)]
    with float32_forward(model):
        hidden = embed(model, measured, batch_size=calibration.batch_size)
        positions = compared_positions(measured, vocabulary=len(model.get_output_embeddings().weight))
        alike = Alike()
        dense = [Predictions.of(_log_probabilities(model, batch, positions, {}, alike)) for batch in batches]
    some = replace(calibration, tokens=_first(calibration.tokens, _curve_windows(calibration)), cache=None)
    costs: Costs = []
    for index, (layer, statistics) in enumerate(
        zip(layers, some.statistics(frozenset().union(*modules.values()), loop="measured loss"), strict=True)
    ):
        costs.append({})
        alike = Alike()
        if index not in skip_layers:
            for module in modules:
                prospect, points = PROSPECTS[module](calibration.family, layer, statistics), {}
                for removed in sorted({prospect.removed(share) for share in shares}):
                    with float32_forward(model), _acting_as(prospect.map(removed)):
                        points[removed] = _divergence(model, hidden, index, batches, positions, dense, alike)
                costs[-1][module] = expected(prospect.curve, points)
        with float32_forward(model):
            advance(hidden, index, layer)
    return costs


def measured_windows(ids: Tensor, *, num_layers: int, num_shares: int) -> Tensor:
    """The first calibration windows, or their beginnings.

    So many tokens that all measurements together cost about half a pass over all windows. More where that is short of
    ``ENOUGH_TOKENS``, but not above two passes, unless that were fewer than ``FEWEST_TOKENS``.
    """
    num_samples, length = ids.shape
    measurements = 4 * num_layers * num_shares
    tokens = max(
        num_samples // measurements * length, min(ENOUGH_TOKENS, 4 * ids.numel() // measurements), FEWEST_TOKENS
    )
    num_windows = -(-tokens // length)
    return ids[:num_windows, : -(-tokens // num_windows)]


def compared_positions(measured: Tensor, *, vocabulary: int) -> Tensor | None:
    """Where in each of the ``measured`` windows predictions are compared, evenly spaced.

    None: everywhere, where the vocabulary is small.
    """
    num_windows, length = measured.shape
    count = -(-max(MOST_ENTRIES // vocabulary, FEWEST_PREDICTIONS) // num_windows)
    return None if count >= length else torch.arange(1, count + 1, device=measured.device) * length // count - 1


def perturbed_passes(calibration: Calibration, *, num_modules: int, num_shares: int) -> float:
    """Passes over all calibration windows that the forwards of ``rank_costs`` amount to, without those of its
    statistics.
    """
    ids, L = calibration.tokens.ids, calibration.num_layers
    measured = measured_windows(ids, num_layers=L, num_shares=num_shares)
    return (2 + num_modules * num_shares * (L + 1) / 2) * measured.numel() / ids.numel()


def _curve_windows(calibration: Calibration) -> int:
    num_samples, length = calibration.tokens.ids.shape
    channels = read_mlp(calibration.family, decoder_layers(calibration.model)[0]).inner_size
    return min(num_samples, max(num_samples // 4, -(-TOKENS_PER_CHANNEL * channels // length)))


def _first(tokens: CalibrationTokens, num_samples: int) -> CalibrationTokens:
    return replace(tokens, ids=tokens.ids[:num_samples])


def expected(curve: list[float], points: Mapping[int, float]) -> list[float]:
    """Divergence at each k from the closed-form squared error ``curve[k]`` and the measured ``points`` (k: divergence).

    Proportional to the error up to the first point; beyond, log divergence is linear in log error through the points,
    and never falls. Points below ``SMALLEST`` are not measured: if all are, the last one stands at that, and the
    divergence is proportional to the error.
    """
    reduced = [k for k in sorted(points) if curve[k] > 0]
    measured = {k: points[k] for k in reduced if points[k] > SMALLEST} or dict.fromkeys(reduced[-1:], SMALLEST)
    known = [(math.log(curve[k]), math.log(divergence)) for k, divergence in measured.items()]
    values = [0.0]
    for error in curve[1:]:
        if error <= 0 or not known:
            values.append(values[-1])
            continue
        x = math.log(error)
        place = sum(point[0] <= x for point in known)
        if place == 0 or len(known) == 1:
            y = known[0][1] + x - known[0][0]
        else:
            (x_0, y_0), (x_1, y_1) = known[place - 1 : place + 1] if place < len(known) else known[-2:]
            slope = (y_1 - y_0) / (x_1 - x_0) if x_1 > x_0 else 1.0
            y = y_0 + (x - x_0) * slope
        values.append(max(math.exp(y), values[-1]))
    return values


SMALLEST = 1e-12
"""A divergence below this is the rounding of float32 logits."""

CHUNK_ENTRIES = 2**17
"""About so many log probabilities are compared in float64 at a time: they stay in a processor's cache."""


@contextmanager
def float32_forward(model: nn.Module) -> Iterator[None]:
    """Inside, a half-precision ``model`` computes in float32: each module's own weights are widened for as long as it
    runs.

    Rounding to 8 or 11 bits moves the predictions by more than the removal of a few dims does. Nothing changes for a
    wider model.
    """
    leaves = [
        module
        for module in model.modules()
        if any(parameter.itemsize < 4 for parameter in module.parameters(recurse=False))
    ]
    handles = []
    for module in leaves:
        narrow = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
        handles.append(module.register_forward_pre_hook(partial(_widen, narrow)))
        handles.append(module.register_forward_hook(partial(_narrow, narrow), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widen(narrow: dict[str, Tensor], module: nn.Module, _: object) -> None:
    for name, tensor in narrow.items():
        getattr(module, name).data = tensor.float()


def _narrow(narrow: dict[str, Tensor], module: nn.Module, *_: object) -> None:
    for name, tensor in narrow.items():
        getattr(module, name).data = tensor


@contextmanager
def _acting_as(others: StandIns) -> Iterator[None]:
    """Modules with other forwards."""
    for module, other in others:
        vars(module)["forward"] = other
    try:
        yield
    finally:
        for module, _ in others:
            del module.forward


@dataclass(frozen=True)
class Predictions:
    """Of the next token: log_p (predictions, vocabulary), float32 or wider, and p, float64."""

    log_p: Tensor
    p: Tensor

    @classmethod
    def of(cls, log_p: Tensor) -> "Predictions":
        """With the probabilities themselves."""
        return cls(log_p, log_p.double().exp())


@torch.no_grad()
def _log_probabilities(
    model: PreTrainedModel,
    batch: Tensor,
    positions: Tensor | None,
    replaced: Mapping[int, Callable],
    alike: Alike,
) -> Tensor:
    """Of the next token, (batch * positions, vocabulary), float32, with ``replaced[i]`` for the forward of layer i."""
    layers, kept = decoder_layers(model), 0 if positions is None else positions.to(batch.device)

    def stand_in(index: int) -> Callable:
        return replaced.get(index, partial(type(layers[index]).forward, layers[index]))

    with layers_replaced(layers, stand_in) if replaced else nullcontext(), alike.forward(batch.shape):
        logits = model(batch, use_cache=False, logits_to_keep=kept).logits
    return logits.float().log_softmax(dim=-1).flatten(0, 1)


def _divergence(
    model: PreTrainedModel,
    hidden: HiddenStates,
    index: int,
    batches: list[Tensor],
    positions: Tensor | None,
    dense: list[Predictions],
    alike: Alike,
) -> float:
    """Mean KL divergence a prediction of the model as it is now from ``dense``; the layers before ``index`` do not run
    again. ``alike``: that of all forwards from ``index``.
    """

    def skip(hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states

    total, count = 0.0, 0
    layer = decoder_layers(model)[index]
    for x, batch, predictions in zip(hidden.batches, batches, dense, strict=True):
        replaced: dict[int, Callable] = {earlier: skip for earlier in range(index)}
        replaced[index] = lambda _, x=x, **arguments: type(layer).forward(layer, x, **arguments)
        total += kl_divergence(predictions, _log_probabilities(model, batch, positions, replaced, alike))
        count += len(predictions.p)
    return total / count


def kl_divergence(dense: Predictions, log_q: Tensor) -> float:
    """Sum over rows of ``KL(p || q)`` in nats, log_q (rows, vocabulary).

    As ``sum p (q/p - 1 - log q/p)`` in float64: no term is negative, so that a divergence far below the rounding of the
    logarithms comes out small, and not as noise of either sign.
    """
    total, rows = 0.0, max(CHUNK_ENTRIES // log_q.shape[-1], 1)
    for p, log_p, log_q_part in zip(dense.p.split(rows), dense.log_p.split(rows), log_q.split(rows), strict=True):
        d = log_q_part.double() - log_p.double()
        total += float(torch.dot(p.flatten(), d.expm1().sub_(d).flatten()))
    return total


VERSION = 1
"""Raised whenever ``rank_costs`` changes what it returns, so that what an older version kept is not found."""


@dataclass(frozen=True)
class KeptCosts:
    """The costs of the calibration behind ``cache``, which do not depend on the rate: measured once, they serve a
    sweep.

    One float64 vector (size + 1,) a layer and module, kept as the calibration's statistics are.

    Args:
        modules, shares, skip_layers: as ``rank_costs`` takes them; they decide the costs.
    """

    cache: StatisticsCache
    modules: Mapping[str, frozenset[str]]
    shares: tuple[float, ...]
    skip_layers: tuple[int, ...]

    @property
    def _names(self) -> dict[str, str]:
        """What each module's costs are called in the cache."""
        decides = {
            "version": VERSION,
            "modules": {module: sorted(names) for module, names in self.modules.items()},
            "shares": list(self.shares),
            "skip_layers": list(self.skip_layers),
        }
        return {module: f"costs-{json_sha256(decides)[:32]}.{module}" for module in self.modules}

    def load(self, num_layers: int) -> Costs | None:
        """The costs of all layers; None if one is missing or damaged."""
        names = self._names
        costs: Costs = []
        for index in range(num_layers):
            wanted = {} if index in self.skip_layers else names
            found = self.cache.load(index, frozenset(wanted.values()))
            if len(found) < len(wanted):
                return None
            costs.append({module: found[name].tolist() for module, name in wanted.items()})
        return costs

    def store(self, costs: Costs) -> None:
        """Keep the costs as far as they fit."""
        names = self._names
        for index, of_layer in enumerate(costs):
            self.cache.store(
                index, {names[module]: torch.tensor(curve, dtype=torch.float64) for module, curve in of_layer.items()}
            )
