"""SlimGPT: layer by layer, optimal brain surgeon in batches, at rates that rise with depth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from modegpt.calibration.stream import HiddenStates, advance
from modegpt.decompositions.linalg import psd_cholesky
from modegpt.errors import UserError
from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.methods.obc import eliminate_blocks, hessians, refitted_layer, statistics_read
from modegpt.methods.structures import Kept, LayerWeights, StructureSizes, pruned_model
from modegpt.models import (
    LayerShape,
    build_layer,
    compressed_config,
    decoder_layers,
    dense_shape,
    layer_tensors,
    merged_tensors,
)

LARGEST_RATE = 0.95
"""That a layer is given while the target allows it."""


def rising_rates(sparsity: float, num_layers: int, first: float) -> list[float]:
    """Sparsity of every layer: ``r_i = r_0 + (r_last - r_0) log(i + 1) / log(L)``, whose mean is ``sparsity``.

    ``r_0 = first * sparsity``; a larger one where the last layer would pass ``LARGEST_RATE`` (and ``sparsity``).
    """
    if num_layers == 1:
        return [sparsity]
    depth = [math.log(index + 1) / math.log(num_layers) for index in range(num_layers)]
    mean, cap = sum(depth) / num_layers, max(LARGEST_RATE, sparsity)
    r_0 = max(first * sparsity, (sparsity - cap * mean) / (1 - mean))
    return [r_0 + (sparsity - r_0) / mean * at for at in depth]


def eliminate_batches(H: Tensor, W: Tensor, num_removed: int, *, first: int, last: int) -> Tensor:
    """Rows (num_removed,) of W (n, m) that go, in batches that halve from ``first`` rows down to ``last``.

    A batch is the rows of least cost ``||B_j||^2 / P_jj``, with ``P = (H_AA)^-1`` of the rows A that are left and B
    their refitted weights, which are brought up to date for all of its rows jointly. Batches of one row are the exact
    greedy order. H (n, n); float64, some n^3 + n^2 m FLOPs.
    """
    P, B = psd_cholesky(H).inverse(), W.double().clone()
    alive = torch.ones(len(W), dtype=torch.bool, device=W.device)
    removed: list[Tensor] = []
    size, left = first, num_removed
    while left > 0:
        cost = torch.where(alive, B.square().sum(dim=1) / P.diagonal(), torch.inf)
        S = cost.argsort(stable=True)[: min(size, left)]
        columns = torch.linalg.solve(P[S][:, S], P[S]).mT
        B -= columns @ B[S]
        P -= columns @ P[S]
        alive[S] = False
        P[S, S] = 1.0  # what is gone divides nothing
        removed.append(S)
        size, left = max(size // 2, last), left - len(S)
    return torch.cat(removed) if removed else alive.new_zeros(0, dtype=torch.long)


@dataclass(frozen=True)
class SlimGPT(Method):
    """SlimGPT (Ling, Wang, Yan & Liu, NeurIPS 2024, arXiv 2412.18110), without fine-tuning.

    From the first layer to the last, on the inputs that the layers pruned so far give it: batched greedy pruning takes
    the key/value groups off the output projection one at a time (their errors from the Cholesky factors of all blocks
    of the inverse Hessian at once) and the channels off the down projection in batches that become smaller (dynamic
    group size), what is left making up for it (optimal brain surgeon). The incremental pruning ratio rises with the
    logarithm of the layer's depth, because the error of early layers grows on its way.

    Differs from the paper: whole key/value groups where it has no grouped-query attention; groups are rounded to whole
    ones, and the layer's channels make up the difference. Official code was not at hand: the sizes of the batches are
    read from restatements of the paper, and ``first`` is ours.

    Args:
        first: the first layer's sparsity, relative to the target.
        batch: channels of the first batch as a share of the MLP's width (1,024 of 11,008); each next one is half as
            large.
        last_batch: channels of the smallest batch.
        damping: added to the diagonal of the input's Gram matrix, relative to its mean.
    """

    name: ClassVar[str] = "slimgpt"
    experts: ClassVar[bool] = True

    first: float = 0.5
    batch: float = 1024 / 11008
    last_batch: int = 8
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.first <= 1:
            raise UserError(f"method.first={self.first} is outside [0, 1]: the first layer loses the least")
        if not 0 < self.batch <= 1:
            raise UserError(f"method.batch={self.batch} is outside (0, 1]")
        if self.last_batch < 1:
            raise UserError(f"method.last_batch={self.last_batch} is too small: at least 1")
        if self.damping <= 0:
            raise UserError(f"method.damping={self.damping} must be positive: the Gram of few tokens is singular")

    def compress(self, task: CompressionTask) -> Compressed:
        """Prune every layer behind the pruned ones, at the rate of its depth."""
        dense, calibration = dense_shape(task.model.config), task.calibration
        layers, family = decoder_layers(task.model), task.family
        if task.sparsity == 0:
            return pruned_model(task, [Kept.everything(dense)] * len(layers))
        rates = rising_rates(task.sparsity, len(layers), self.first)
        shapes = self.shapes(rates, dense, StructureSizes.of(family, layers[0], dense))
        config = compressed_config(task.model.config, shapes)
        kept, weights = [], []
        with torch.no_grad():
            hidden = calibration.embed()
            for index in calibration.progress.track(range(len(layers)), "pruning", unit="layer"):
                with calibration.meter.stage("pruning", counted=True):
                    inputs = HiddenStates(list(hidden.batches), hidden.arguments)
                    statistics = calibration.observe(inputs, index, statistics_read(family))
                    of_layer = LayerWeights.read(family, layers[index])
                    H_o, H = hessians(of_layer, statistics, self.damping)
                    kept.append(self.kept(of_layer, H_o, H, dense, shapes[index]))
                    weights.append(refitted_layer(of_layer, kept[-1], H_o, H))
                    small = weights[-1].without_removed(kept[-1])
                    tensors = layer_tensors(family, task.model.config, shapes[index], **vars(small))
                    pruned = build_layer(config, index, merged_tensors(family, layers[index], tensors))
                    advance(hidden, index, pruned)
                calibration.meter.forward_passes += 1 / len(layers)  # beside the one observed
        calibration.meter.calibration_tokens = calibration.tokens.num_tokens
        return pruned_model(task, kept, weights, rates=rates)

    @staticmethod
    def shapes(rates: list[float], dense: LayerShape, sizes: StructureSizes) -> list[LayerShape]:
        """The layers' shapes at ``rates``; what one cannot spend is handed on to the next."""
        num_groups, width = dense.num_kv_heads, dense.intermediate_size
        of_layer = sizes.group * num_groups + sizes.channel * width
        shapes, left = [], 0.0
        for rate in rates:
            left += rate * of_layer
            groups, channels = sizes.even_shares(num_groups, width, left)
            left -= groups * sizes.group + channels * sizes.channel
            shapes.append(replace(dense, num_kv_heads=num_groups - groups, intermediate_size=width - channels))
        return shapes

    def kept(
        self, weights: LayerWeights, H_o: Tensor, H: Sequence[Tensor], dense: LayerShape, shape: LayerShape
    ) -> Kept:
        """What stays of a layer of ``dense`` shape so that it has ``shape``."""
        kept = Kept.everything(dense)
        groups, _ = eliminate_blocks(H_o, weights.value_output.W_O.flatten(0, 1), dense.num_kv_heads)
        kept.groups[groups[: dense.num_kv_heads - shape.num_kv_heads].cpu()] = False
        width = dense.intermediate_size
        first = max(round(self.batch * width), self.last_batch)
        channels = kept.channels.repeat(len(H), 1)
        for of_mlp, own, mlp in zip(channels, H, weights.mlps, strict=True):
            removed = width - shape.intermediate_size
            of_mlp[eliminate_batches(own, mlp.W_D, removed, first=first, last=self.last_batch).cpu()] = False
        return replace(kept, channels=channels.squeeze(0))
