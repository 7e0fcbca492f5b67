"""How sharp the compressed model's predictions are: one number, absorbed in its final norm."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modegpt.calibration.stream import HiddenStates, Storage, advance, layers_replaced, yielding
from modegpt.calibration.world import ALONE, World
from modegpt.cost.work import forward
from modegpt.methods.divergence import float32_forward
from modegpt.models import Family, decoder_layers

ENOUGH_TOKENS = 1024
"""Predictions are compared on about so many calibration tokens."""

CHUNK_TOKENS = 256
"""Logits of so many tokens are worked on at a time."""

MOST_LOGITS = 2**27
"""So many logits of the compressed model are kept for the next step (512 MiB); the head gives the others again."""

BOUNDS = (0.01, 100.0)
TOLERANCE = 1e-3
MOST_STEPS = 50


@dataclass
class Compared:
    """The dense and the compressed residual stream of the tokens whose predictions are compared, float32 at least."""

    storage: Storage
    ids: list[Tensor]
    dense: HiddenStates
    compressed: HiddenStates
    world: World = ALONE

    @classmethod
    def of(cls, storage: Storage, ids: Tensor, *, batch_size: int, world: World = ALONE) -> "Compared":
        """In front of the first layer, on the first windows of ``ids`` (windows, length), or this process's of them."""
        windows = ids[: -(-ENOUGH_TOKENS // ids.shape[1])]
        batches = list(windows.split(batch_size)[world.rank :: world.size])
        with float32_forward(storage.model):
            own = torch.cat([ids[:0], *batches])
            dense, compressed = (storage.embed(own, batch_size=batch_size) for _ in range(2))
        return cls(storage, batches, dense, compressed, world)

    def advance(self, index: int, layer: nn.Module, reduced: nn.Module) -> None:
        """Each goes through its own form of layer ``index``."""
        for stream, own in ((self.dense, layer), (self.compressed, reduced)):
            with float32_forward(own):
                advance(stream, index, own)

    @torch.no_grad()
    def inverse_temperature(self) -> float:
        """Behind the last layer: the s that ``inverse_temperature`` finds."""
        with self.storage.outer(head=True) as model, float32_forward(model):
            head: Any = model.get_output_embeddings()

            def states(stream: HiddenStates) -> Tensor:
                rows = []
                for ids, x in zip(self.ids, stream.batches, strict=True):
                    with layers_replaced(decoder_layers(model), yielding(x)), forward():
                        behind = model.get_decoder()(ids.to(model.device), use_cache=False).last_hidden_state
                    rows.append(behind.flatten(0, 1))
                return torch.cat(list(self.world.in_order(rows, head.weight.device)))

            ours, theirs = states(self.dense), states(self.compressed)
            return inverse_temperature(ours, theirs, dense_head=head, head=head, world=self.world)


@torch.no_grad()
def inverse_temperature(
    ours: Tensor, theirs: Tensor, *, dense_head: nn.Module, head: Any, world: World = ALONE
) -> float:
    """The s at which softmax(s z), z the compressed model's logits, diverges least (mean KL) from the dense model's
    predictions p.

    From what the heads of both read, (tokens, d_h) each. The divergence is convex in s with derivatives E_q[z] - E_p[z]
    and Var_q[z] under q = softmax(s z), so Newton's method finds it from logits alone. Temperature scaling: Guo et al.,
    ICML 2017, arXiv 1706.04599, section 4.2, with the dense model's predictions in place of labels. The head of the
    compressed model runs once, and once more a step for the tokens whose logits are not kept. Several processes, which
    all have all tokens, take chunks of them by turns.
    """
    ours_here, chunks = (states.split(CHUNK_TOKENS)[world.rank :: world.size] for states in (ours, theirs))
    kept = [head(chunk).float() for chunk in chunks[: MOST_LOGITS // (CHUNK_TOKENS * len(head.weight))]]

    def logits() -> Iterator[Tensor]:
        return chain(kept, (head(chunk).float() for chunk in chunks[len(kept) :]))

    means = (_mean_under(dense_head(chunk).float(), z) for chunk, z in zip(ours_here, logits(), strict=True))
    target = sum(world.in_order(means, ours.device))
    s = 1.0
    for _ in range(MOST_STEPS):
        slope, curvature = -target, 0.0
        for mean, variance in world.in_order((_under(s, z) for z in logits()), ours.device):
            slope, curvature = slope + mean, curvature + variance
        if curvature <= 0:
            break
        before, s = s, min(max(s - slope / curvature, BOUNDS[0], s / 2), BOUNDS[1], 2 * s)
        if abs(s - before) < TOLERANCE:
            break
    return s


@torch.no_grad()
def sharpened_norm(model: PreTrainedModel, family: Family, s: float) -> dict[str, Tensor]:
    """The tensors of the final norm, by name, that multiply the logits of ``model`` by ``s``."""
    norm: Any = family.final_norm(model)
    assert norm is not None
    weight = s * (norm.weight.double() + family.norm_offset) - family.norm_offset
    tensors = {"weight": weight.to(norm.weight.dtype)}
    if getattr(norm, "bias", None) is not None:
        tensors["bias"] = (s * norm.bias.double()).to(norm.bias.dtype)
    return {f"{family.final_norm_path}.{name}": tensor for name, tensor in tensors.items()}


def _under(s: float, z: Tensor) -> tuple[float, float]:
    """Sums over rows of the mean and of the variance of ``z`` under softmax(s z)."""
    q = (s * z).softmax(dim=-1)
    mean = torch.linalg.vecdot(q, z)
    variance = torch.linalg.vecdot(q, (z - mean.unsqueeze(-1)).square())
    return float(mean.sum(dtype=torch.float64)), float(variance.sum(dtype=torch.float64))


def _mean_under(dense: Tensor, z: Tensor) -> float:
    """Sum over rows of the mean of ``z`` under softmax(dense)."""
    return float(torch.linalg.vecdot(dense.softmax(dim=-1), z).sum(dtype=torch.float64))
