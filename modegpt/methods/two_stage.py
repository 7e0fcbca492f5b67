"""2SSP: MLP channels of small norm go, then whole attentions, each time the one that the model predicts best without.

Sandri, Cunegatti and Iacca, "2SSP: A Two-Stage Framework for Structured Pruning of LLMs", TMLR 2025, arXiv 2501.17771,
sections 3.1 to 3.3.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modegpt.calibration.stream import advance, embed
from modegpt.decompositions.selection import largest
from modegpt.errors import UserError
from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.methods.divergence import StandIns, acting_as
from modegpt.methods.sleb import losses_without
from modegpt.methods.structures import Kept, LayerWeights, StructureSizes, pruned_model
from modegpt.models import Family, decoder_layers, dense_shape


def num_attentions(sparsity: float, num_layers: int, *, attention: int, mlp: int, alpha: float) -> int:
    """Attentions to remove of ``num_layers``: ``round(L sparsity^(mlp / (attention alpha)))``, equation 5.

    attention, mlp: weights of one each.
    """
    return round(num_layers * sparsity ** (mlp / attention / alpha))


@dataclass(frozen=True)
class TwoStage(Method):
    """Width pruning of the MLPs, then depth pruning of attentions.

    First stage: a channel's importance is the norm of what the down projection reads of it over a window's tokens,
    averaged over windows, all on the dense model; every MLP loses as many. Second stage: the attention goes whose
    absence leaves the lowest perplexity on a few windows, of the model of the first stage and without those that went
    before; one a step. How many go, equation 5 balances by what attention and MLP weigh. Nothing is refitted.

    Follows the paper and the official code (FabrizioSandri/2SSP, ``src/pruning.py``), which counts biases and norms
    where this counts block-linear weights, and refuses a sparsity that equation 5's attentions alone would pass; here
    as many go as the sparsity allows. Ties go to the earliest.

    Cost: a forward pass, and for each attention that goes about half a pass over the windows of the second stage for
    every one that is left.

    Args:
        alpha: of equation 5; the larger, the more attentions go at a given sparsity below 1.
        search_tokens: about so many tokens (whole windows) tell the attentions apart; one window of 2048 in the paper.
    """

    name: ClassVar[str] = "2ssp"

    alpha: float = 1.5
    search_tokens: int = 2048

    def __post_init__(self) -> None:
        if not self.alpha > 0 or self.search_tokens < 1:
            raise UserError(
                f"2ssp alpha={self.alpha:g} and search_tokens={self.search_tokens} must be above 0: an exponent's "
                "divisor and a number of tokens"
            )

    def balance(self, task: CompressionTask) -> tuple[int, int]:
        """Attentions to remove of the model, and channels of every MLP. Raises UserError where there are not enough."""
        layers, shape = decoder_layers(task.model), dense_shape(task.model.config)
        sizes = StructureSizes.of(task.family, layers[0], shape)
        attention, mlp = sizes.group * shape.num_kv_heads, sizes.channel * shape.intermediate_size
        count = num_attentions(task.sparsity, len(layers), attention=attention, mlp=mlp, alpha=self.alpha)
        of_layer = task.sparsity * (attention + mlp)
        count = min(count, int(of_layer * len(layers) / attention))
        channels = round((of_layer - count * attention / len(layers)) / sizes.channel)
        if channels >= shape.intermediate_size:
            raise UserError(
                f"2ssp cannot remove {task.sparsity:.1%} with method.alpha={self.alpha:g}: {count} of {len(layers)} "
                f"attentions go, and {channels} of {shape.intermediate_size} channels of every MLP would have to; "
                "raise method.alpha"
            )
        return count, channels

    def check(self, task: CompressionTask) -> None:
        """Raise UserError for a sparsity that cannot be had."""
        self.balance(task)

    @torch.no_grad()
    def compress(self, task: CompressionTask) -> Compressed:
        """Both stages."""
        calibration, shape = task.calibration, dense_shape(task.model.config)
        count, channels = self.balance(task)
        kept = [Kept.everything(shape)] * calibration.num_layers
        if channels:
            left = shape.intermediate_size - channels
            kept = [
                replace(each, channels=torch.zeros_like(each.channels).index_fill(0, largest(norms.cpu(), left), True))
                for each, norms in zip(kept, channel_norms(task), strict=True)
            ]
        gone, perplexities = self._search(task, pruned_model(task, kept).model, count) if count else ([], [])
        weights = [LayerWeights.read(task.family, layer) for layer in decoder_layers(task.model)]
        for index in gone:
            kept[index] = replace(kept[index], groups=torch.zeros_like(kept[index].groups))
            b_O = weights[index].value_output.b_O
            without = None if b_O is None else torch.zeros_like(b_O)
            weights[index] = replace(weights[index], value_output=replace(weights[index].value_output, b_O=without))
        return pruned_model(task, kept, weights, removed_attentions=gone, calibration_perplexities=perplexities)

    def _search(self, task: CompressionTask, model: PreTrainedModel, count: int) -> tuple[list[int], list[float]]:
        """Which attentions of ``model`` go, in order, and the perplexity after each."""
        calibration, num_layers = task.calibration, task.calibration.num_layers
        ids = calibration.tokens.ids[: -(-self.search_tokens // calibration.tokens.ids.shape[1])]
        gone: list[int] = []
        perplexities = []
        num_candidates = sum(num_layers - step for step in range(count))
        bar = calibration.progress.bar(num_candidates, "attention elimination", "candidate")
        with calibration.meter.stage("elimination", counted=True), bar:
            start = embed(model, ids, batch_size=calibration.batch_size)
            layers, without = decoder_layers(model), partial(_without_attention, task.family)
            for _ in range(count):
                candidates = [index for index in range(num_layers) if index not in gone]
                with acting_as([stand_in for index in gone for stand_in in without(layers[index])]):
                    losses, layers_run = losses_without(
                        model, ids, start, list(range(num_layers)), candidates, on_candidate=bar.update, part=without
                    )
                calibration.meter.forward_passes += layers_run / num_layers * len(ids) / len(calibration.tokens.ids)
                gone.append(min(losses, key=losses.__getitem__))
                perplexities.append(math.exp(losses[gone[-1]]))
        return gone, perplexities


def channel_norms(task: CompressionTask) -> Iterator[Tensor]:
    """Of each layer the norm of every MLP channel over a window's tokens, averaged over windows, (n,)."""
    calibration = task.calibration
    length, hidden = calibration.tokens.ids.shape[1], calibration.embed()
    for index, layer in enumerate(calibration.progress.track(decoder_layers(task.model), "norms", unit="layer")):
        norms: list[Tensor] = []

        def note(_: nn.Module, given: tuple[Tensor], norms: list[Tensor] = norms) -> None:
            of_windows = given[0].reshape(-1, length, given[0].shape[-1])
            norms.append(torch.linalg.vector_norm(of_windows, dim=1))

        handle = task.family.down(layer).register_forward_pre_hook(note)
        try:
            with calibration.meter.stage("statistics", counted=True):
                advance(hidden, index, layer)
        finally:
            handle.remove()
        yield torch.cat(norms).double().mean(dim=0)
    calibration.meter.forward_passes += 1
    calibration.meter.calibration_tokens = calibration.tokens.num_tokens


def _without_attention(family: Family, layer: nn.Module) -> StandIns:
    return [(family.attention(layer), lambda hidden_states, *_, **__: (torch.zeros_like(hidden_states), None))]
