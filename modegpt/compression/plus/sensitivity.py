"""How much each module's reduction moves the model's predictions, measured; and what every rank would cost by that."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modegpt.architectures import build_layer, compressed_config, decoder_layers, merged_tensors
from modegpt.calibration.statistics import Statistics
from modegpt.calibration.stream import HiddenStates, advance, embed, layers_replaced
from modegpt.compression.modegpt import READ, STATISTIC, VIEW, MoDeGPT, assemble_layer
from modegpt.compression.task import CompressionTask
from modegpt.decompositions.curves import mlp_curve, query_key_curve, value_output_curve
from modegpt.decompositions.modules import Weights
from modegpt.decompositions.selection import group_heads

LEAST_TOKENS = 1024
"""Divergences are measured on at least about this many calibration tokens."""


def measured_windows(ids: Tensor, *, num_layers: int, num_shares: int) -> Tensor:
    """The first calibration windows: so many that all measurements together cost about one and a half passes over all of them."""
    num_samples, length = ids.shape
    return ids[: max(num_samples // (num_layers * num_shares), -(-LEAST_TOKENS // length))]


def rank_costs(task: CompressionTask, faithful: MoDeGPT, shares: tuple[float, ...], skip_layers: tuple[int, ...]) -> list[dict[str, list[float]]]:
    """costs[layer][module][k]: KL divergence expected from removing k dims of that module alone.

    Each module loses each share in ``shares`` of its dims (closed form, dense statistics), the rest of the model runs dense on a
    few calibration windows, and the divergence from the dense model's predictions is measured; ``expected`` carries it to all
    ranks. One statistics pass, and ``3 L^2 / 2`` layer passes a share over the measured windows; no evaluation data, no gradient.
    """
    calibration, model = task.calibration, task.model
    layers = decoder_layers(model)
    ids = measured_windows(calibration.tokens.ids, num_layers=len(layers), num_shares=len(shares))
    hidden = embed(model, ids, batch_size=calibration.batch_size)
    batches = [batch.to(model.device) for batch in ids.split(calibration.batch_size)]
    dense = [_log_probabilities(model, batch, {}) for batch in batches]
    variants = {module: variant for module, variant in faithful.variants(task.family).items() if variant is not None}
    names = frozenset(STATISTIC[module][key] for module, variant in variants.items() for key in variant.required)
    costs: list[dict[str, list[float]]] = []
    for index, (layer, statistics) in enumerate(zip(layers, calibration.statistics(names), strict=True)):
        costs.append({})
        if index not in skip_layers:
            for module, variant in variants.items():
                weights = READ[module](task.family, layer)
                view, points = VIEW[module](statistics, calibration.tokens.num_tokens), {}
                for rank in {_rank(weights, share) for share in shares}:
                    reduced = _layer(task, index, layer, {module: variant(weights, view, rank, task.generator())})
                    points[weights.inner_size - rank] = _divergence(model, hidden, index, reduced, batches, dense)
                costs[-1][module] = expected(_curve(module, weights, statistics), points)
        advance(hidden, index, layer)
    return costs


def expected(curve: list[float], points: Mapping[int, float]) -> list[float]:
    """Divergence at each k from the closed-form squared error ``curve[k]`` and the measured ``points`` (k: divergence).

    Proportional to the error up to the first point; beyond, log divergence is linear in log error through the points, and never falls.
    """
    known = [(math.log(curve[k]), math.log(max(points[k], SMALLEST))) for k in sorted(points) if curve[k] > 0]
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
"""A divergence below this is rounding."""


def _rank(weights: Weights, share: float) -> int:
    unit = weights.rank_unit
    return min(max(round((1 - share) * weights.inner_size / unit), 1) * unit, weights.inner_size - unit)


def _curve(module: str, weights: Weights, statistics: Statistics) -> list[float]:
    """Closed-form error of removing k = 0 ... size dims; a dim that splits a rotary pair costs what the pair costs."""
    if module == "mlp":
        return mlp_curve(statistics["mlp.C"], weights.W_D).tolist()
    if module == "value_output":
        A = statistics.get("value_output.A")
        G = statistics["value_output.G"] if A is None else group_heads(A, len(weights.W_V)).sum(dim=1)
        return value_output_curve(G, weights.W_O).tolist()
    curve = query_key_curve(statistics["query_key.C_Q"], statistics["query_key.C_K"], rope=weights.rope).tolist()
    return [curve[-(-k // weights.rank_unit)] for k in range(weights.inner_size + 1)]


def _layer(task: CompressionTask, index: int, layer: nn.Module, reductions: dict) -> nn.Module:
    shape, changed = assemble_layer(task.family, task.model.config, reductions)
    config = compressed_config(task.model.config, [shape] * task.calibration.num_layers)
    return build_layer(config, index, merged_tensors(task.family, layer, changed))


@torch.no_grad()
def _log_probabilities(model: PreTrainedModel, batch: Tensor, replaced: Mapping[int, Callable]) -> Tensor:
    """Log-probabilities with the forward of layer i replaced by ``replaced[i]``."""
    layers = decoder_layers(model)
    with layers_replaced(layers, lambda index: replaced.get(index, partial(type(layers[index]).forward, layers[index]))):
        return model(batch, use_cache=False).logits.float().log_softmax(dim=-1)


def _divergence(model: PreTrainedModel, hidden: HiddenStates, index: int, reduced: nn.Module, batches: list[Tensor], dense: list[Tensor]) -> float:
    """Mean KL divergence a token with ``reduced`` in place of layer ``index``; the layers before it do not run again."""

    def skip(hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states

    total, count = 0.0, 0
    for x, batch, reference in zip(hidden.batches, batches, dense, strict=True):
        replaced: dict[int, Callable] = {earlier: skip for earlier in range(index)}
        replaced[index] = lambda _, x=x, **arguments: reduced(x, **arguments)
        changed = _log_probabilities(model, batch, replaced)
        total += float((reference.exp() * (reference - changed)).sum(dtype=torch.float64))
        count += batch.numel()
    return total / count
