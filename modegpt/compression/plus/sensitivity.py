"""How much each module's reduction moves the model's predictions, measured; and what every rank would cost by that."""

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

MEASURED_TOKENS = 4096
"""Divergences are measured on the first calibration windows, up to about this many tokens."""


def rank_costs(task: CompressionTask, faithful: MoDeGPT, share: float, skip_layers: tuple[int, ...]) -> list[dict[str, list[float]]]:
    """costs[layer][module][k]: KL divergence expected from removing k dims of that module alone.

    Each module loses the share ``share`` of its dims (closed form, dense statistics), the rest of the model runs dense on a few
    calibration windows, and the divergence from the dense model's predictions is measured. Other ranks cost in proportion to
    their closed-form squared error: ``costs[k] = divergence error[k] / error[k measured]``. One statistics pass and at most
    ``3 L^2 / 2`` layer passes over the measured windows; no evaluation data, no gradient.
    """
    calibration, model = task.calibration, task.model
    layers = decoder_layers(model)
    ids = calibration.tokens.ids
    ids = ids[: max(1, MEASURED_TOKENS // ids.shape[1])]
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
                rank = _rank(weights, share)
                reduction = variant(weights, VIEW[module](statistics, calibration.tokens.num_tokens), rank, task.generator())
                divergence = _divergence(model, hidden, index, _layer(task, index, layer, {module: reduction}), batches, dense)
                curve = _curve(module, weights, statistics)
                measured = curve[weights.inner_size - rank]
                costs[-1][module] = [divergence * error / measured if measured > 0 else 0.0 for error in curve]
        advance(hidden, index, layer)
    return costs


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
