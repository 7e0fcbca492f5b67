"""ASVD: truncated SVD of weights scaled by how large their inputs are."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from modegpt.calibration.calibration import Calibration
from modegpt.calibration.stream import HiddenStates, advance, embed
from modegpt.errors import UserError
from modegpt.files import json_sha256
from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.methods.low_rank import (
    Truncation,
    block_linears,
    dense_layers,
    factored_model,
    input_gram,
    input_grams,
    input_statistics,
    layer_ranks,
    paths,
    rank_keeping,
    truncated,
)
from modegpt.methods.sleb import next_token_loss
from modegpt.models import Family, decoder_layers

SMALLEST_SCALE = 1e-6
"""Scale of an input channel that never fired, relative to the largest: last in importance, yet invertible."""


def channel_scale(C: Tensor, alpha: float) -> Tensor:
    """``s_i = rms(x_i)^alpha`` up to a common factor, (in,) float64, from the Gram matrix C (in, in) of the input."""
    rms = C.double().diagonal().clamp(min=0).sqrt()
    largest = rms.max()
    return (rms / largest).clamp(min=SMALLEST_SCALE) ** alpha if largest > 0 else torch.ones_like(rms)


@dataclass(frozen=True)
class ASVD(Method):
    """Activation-aware SVD (Yuan et al. 2023, arXiv 2312.05821, section 3.2).

    The SVD of ``diag(s) W`` with ``s_i = scale(x_i)^alpha`` is truncated.

    Ranks by sensitivity (section 3.3): each map alone keeps 0.4, 0.5, ... 0.9 of its weights, and the perplexity of
    each such model on calibration windows is measured. Then all that leave a perplexity below one threshold are taken,
    a map at the smallest share among its own, and the threshold is the lowest that meets the sparsity. A map none of
    whose models is below it stays dense.

    Differs from the paper: the scale of channel i is its root mean square, from the diagonal of the Gram
    matrix that every method here shares, where the paper takes the mean of ``|x_i|``; the map at the threshold gets
    back the ranks that would remove more than asked; and a model is run from where it differs from the dense one.

    Checked line by line against the official code (hahnyuan/ASVD4LLM), and run beside it on the same tokens (dense
    1.973): with one sparsity, tiny-llama at 20 % has perplexity 2.027 here and 2.029 there with an exact SVD, 2.051
    with its randomised one. Searched on 8 windows of 128 tokens, at 20.9 %, 2.030 here and 2.008 there; on 32 windows
    1.986 here. The search takes most of the time.

    Args:
        alpha: how much the activations weigh, 0 (plain SVD) to 1; 0.5 in the paper.
        rank_search: ranks by sensitivity; otherwise every map has one sparsity.
        search_windows: the search measures on so many calibration windows, as many as the official code, whose windows
            have 2048 tokens. Fewer are a false economy: tiny-llama at 20 % has perplexity 1.88 with 32 windows of 256
            tokens, 1.89 with 16, 1.94 with 8 and 2.16 with 2, where one sparsity gives 1.91 (dense 1.87).
    """

    name: ClassVar[str] = "asvd"
    experts: ClassVar[bool] = True

    alpha: float = 0.5
    rank_search: bool = field(default=True, metadata={"before": False})
    search_windows: int = field(default=32, metadata={"before": 32})

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"method.alpha={self.alpha} is outside [0, 1]")
        if self.search_windows < 1:
            raise UserError(f"method.search_windows={self.search_windows} must be at least 1")

    def required_statistics(self, family: Family) -> frozenset[str]:
        """The Gram matrix of each map's input."""
        return input_statistics(family)

    @torch.no_grad()
    def compress(self, task: CompressionTask) -> Compressed:
        """Truncate block-linear weights, scaled by their inputs."""
        if task.sparsity == 0:
            return dense_layers(task)
        scales = self._scales(task)
        ranks = self._searched_ranks(task, scales) if self.rank_search else layer_ranks(task)
        return factored_model(task, ranks, self._truncations(task, scales, ranks))

    def _scales(self, task: CompressionTask) -> list[dict[str, Tensor]]:
        """The scales of each layer's input channels, by the role of the map."""
        scales = []
        observed = task.calibration.statistics(input_statistics(task.family), loop="decomposition")
        for layer, statistics in zip(decoder_layers(task.model), observed, strict=True):
            grams = input_grams(task.family, layer, statistics)
            of_input = {name: channel_scale(C, self.alpha) for name, C in grams.items()}
            scales.append({role: of_input[input_gram(role)] for role in block_linears(task.family, layer)})
        return scales

    def _truncations(
        self, task: CompressionTask, scales: list[dict[str, Tensor]], ranks: list[dict[str, int]]
    ) -> Iterator[dict[str, Truncation]]:
        for layer, of_layer, ranks_of_layer in zip(decoder_layers(task.model), scales, ranks, strict=True):
            with task.calibration.meter.stage("solve", counted=True):
                linears = block_linears(task.family, layer)
                truncations = {
                    role: scaled_truncation(linears[role].weight.detach().T, of_layer[role], rank)
                    for role, rank in ranks_of_layer.items()
                }
            yield truncations

    def _searched_ranks(self, task: CompressionTask, scales: list[dict[str, Tensor]]) -> list[dict[str, int]]:
        layers = decoder_layers(task.model)
        sizes = {
            (index, role): (linear.in_features, linear.out_features)
            for index, layer in enumerate(layers)
            for role, linear in block_linears(task.family, layer).items()
        }
        shares = sorted({*SHARES, min(1 - task.sparsity, SHARES[0])})
        losses = {
            ((index, role), rank_keeping(share, sizes[index, role])): loss
            for index, (of_layer, roles) in enumerate(zip(self._losses(task, scales, shares), scales, strict=True))
            for role, of_map in zip(roles, of_layer.tolist(), strict=True)
            for share, loss in zip(shares, of_map, strict=True)
        }
        chosen = ranks_by_loss(sizes, losses, task.sparsity)
        return [{role: rank for (of, role), rank in chosen.items() if of == index} for index in range(len(layers))]

    def _losses(self, task: CompressionTask, scales: list[dict[str, Tensor]], shares: Sequence[float]) -> list[Tensor]:
        """``truncated_losses``, which do not depend on the sparsity: kept beside the statistics, they serve a sweep."""
        calibration, cache = task.calibration, task.calibration.cache
        decides = {"alpha": self.alpha, "windows": self.search_windows, "shares": list(shares)}
        name = f"truncated-{json_sha256(decides)[:32]}.losses"
        with calibration.meter.stage("rank search", counted=True):
            found = [] if cache is None else [cache.load(index, frozenset({name})) for index in range(len(scales))]
            if found and all(found):
                return [of_layer[name] for of_layer in found]
            losses = truncated_losses(calibration, scales, shares, num_windows=self.search_windows)
            if cache is not None:
                for index, of_layer in enumerate(losses):
                    cache.store(index, {name: of_layer})
        return losses


Map = tuple[int, str]
"""A linear map of the model: its layer's index and its role there."""
SHARES = tuple(step / 10 for step in range(4, 10))
"""Of its weights that a map may keep, as in the official code; a higher sparsity adds its own."""


def scaled_truncation(W: Tensor, s: Tensor, rank: int) -> Truncation:
    """The truncation of ``diag(s) W``, W (in, out), s (in,)."""
    return truncated(W, rank, weigh=s.unsqueeze(-1) * W.double(), unweigh=1.0 / s)


def truncated_losses(
    calibration: Calibration, scales: list[dict[str, Tensor]], shares: Sequence[float], *, num_windows: int
) -> list[Tensor]:
    """A layer's (maps, shares), float64: the mean loss (nats a token) with one map alone truncated to one share.

    Args:
        scales: of the inputs of the maps, by role.
        shares: increasing shares of a map's weights that its factors keep.
        num_windows: the loss is that of the first so many calibration windows.
    """
    model, family = calibration.model, calibration.family
    ids = calibration.tokens.ids[:num_windows]
    layers, losses, layers_run = decoder_layers(model), [], 0
    prefix = embed(model, ids, batch_size=calibration.batch_size)
    with calibration.progress.bar(sum(map(len, scales)) * len(shares), "rank search", "truncation") as bar:
        for index, layer in enumerate(layers):
            linears, own = block_linears(family, layer), paths(family, len(family.downs(layer)))
            of_layer: list[list[float]] = []
            for role, s in scales[index].items():
                W = linears[role].weight.detach().T
                factors = scaled_truncation(W, s, rank_keeping(shares[-1], W.shape)).factors
                of_layer.append([])
                for share in shares:
                    rank = rank_keeping(share, W.shape)
                    weight = (factors.A[:, :rank] @ factors.B[:rank]).T
                    of_layer[-1].append(_loss_with(model, ids, prefix, index, {f"{own[role]}.weight": weight}))
                    layers_run += len(layers) - index
                    bar.update()
            losses.append(torch.tensor(of_layer, dtype=torch.float64))
            if index + 1 < len(layers):
                advance(prefix, index, layer)
                layers_run += 1
    calibration.meter.forward_passes += layers_run / len(layers) * len(ids) / len(calibration.tokens.ids)
    return losses


def _loss_with(
    model: PreTrainedModel, ids: Tensor, prefix: HiddenStates, index: int, weights: dict[str, Tensor]
) -> float:
    """The loss with other ``weights`` in layer ``index``, which ``prefix`` enters; infinite where states are."""
    layers, rest = decoder_layers(model), HiddenStates(list(prefix.batches), prefix.arguments)
    try:
        advance(rest, index, lambda x, **arguments: functional_call(layers[index], weights, (x,), arguments))
        for later in range(index + 1, len(layers)):
            advance(rest, later, layers[later])
    except UserError:
        return math.inf
    return next_token_loss(model, ids, rest)


def ranks_by_loss(
    sizes: Mapping[Map, tuple[int, int]], losses: Mapping[tuple[Map, int], float], sparsity: float
) -> dict[Map, int]:
    """Ranks of the maps that are factored (section 3.3).

    Truncations are taken by rising loss, each if it is below what its map has by then, until the maps together store no
    more than ``1 - sparsity`` of their weights. The last map gets back the ranks that were not needed.

    Args:
        sizes: (in, out) by map.
        losses: by map and rank.
    """
    ranks: dict[Map, int] = {}
    total = sum(rows * columns for rows, columns in sizes.values())
    spare = (1 - sparsity) * total - total
    for (each, rank), _ in sorted(losses.items(), key=lambda item: item[1]):
        if spare >= 0:
            break
        rows, columns = sizes[each]
        stored = ranks[each] * (rows + columns) if each in ranks else rows * columns
        if rank * (rows + columns) < stored:
            spare += stored - rank * (rows + columns)
            ranks[each], last = rank, each
    if ranks and spare > 0:
        ranks[last] += int(spare / sum(sizes[last]))
    return ranks
