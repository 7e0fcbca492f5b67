"""How sharp the compressed model's predictions are: one number, absorbed in its final norm."""

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modegpt.cost.work import forward
from modegpt.methods.divergence import float32_forward
from modegpt.models import Family

ENOUGH_TOKENS, FEWEST_TOKENS = 4096, 1024
"""Predictions are compared on about so many calibration tokens; on an eighth of all where that is fewer, but not on
fewer than so many."""

CHUNK_TOKENS = 256
"""Logits of so many tokens are worked on at a time."""

MOST_LOGITS = 2**27
"""So many logits of the compressed model are kept for the next step (512 MiB); the head gives the others again."""

BOUNDS = (0.01, 100.0)
TOLERANCE = 1e-5
MOST_STEPS = 50


@torch.no_grad()
def fit_inverse_temperature(
    dense: PreTrainedModel, compressed: PreTrainedModel, ids: Tensor, *, batch_size: int
) -> float:
    """The s at which softmax(s z), z the compressed model's logits, diverges least (mean KL) from the dense model's
    predictions p.

    ``ids`` (windows, length), of which the first are read. The divergence is convex in s with derivatives E_q[z] -
    E_p[z] and Var_q[z] under q = softmax(s z), so Newton's method finds it from logits alone. Temperature scaling: Guo
    et al., ICML 2017, arXiv 1706.04599, section 4.2, with the dense model's predictions in place of labels. Both models
    run once, and the head of the compressed one once more a step for the tokens whose logits are not kept.
    """
    windows = ids[: -(-max(min(ENOUGH_TOKENS, ids.numel() // 8), FEWEST_TOKENS) // ids.shape[1])]
    with float32_forward(dense), float32_forward(compressed):
        batches = [batch.to(dense.device) for batch in windows.split(batch_size)]
        with forward():
            states = [
                [model.get_decoder()(batch, use_cache=False).last_hidden_state.flatten(0, 1) for batch in batches]
                for model in (dense, compressed)
            ]
        ours, theirs = (torch.cat(each).split(CHUNK_TOKENS) for each in states)
        head: Any = compressed.get_output_embeddings()
        kept = [head(chunk).float() for chunk in theirs[: MOST_LOGITS // (CHUNK_TOKENS * len(head.weight))]]

        def logits() -> Iterator[Tensor]:
            return chain(kept, (head(chunk).float() for chunk in theirs[len(kept) :]))

        target = sum(
            _mean_under(dense.get_output_embeddings()(chunk).float(), z)
            for chunk, z in zip(ours, logits(), strict=True)
        )
        s = 1.0
        for _ in range(MOST_STEPS):
            slope, curvature = -target, 0.0
            for z in logits():
                q = (s * z).softmax(dim=-1)
                mean = torch.linalg.vecdot(q, z)
                slope += float(mean.sum(dtype=torch.float64))
                curvature += float(torch.linalg.vecdot(q, (z - mean.unsqueeze(-1)).square()).sum(dtype=torch.float64))
            if curvature <= 0:
                break
            before, s = s, min(max(s - slope / curvature, BOUNDS[0], s / 2), BOUNDS[1], 2 * s)
            if abs(s - before) < TOLERANCE:
                break
    return s


def sharpen(model: PreTrainedModel, family: Family, s: float) -> None:
    """Multiply the logits of ``model`` by ``s``: through its final norm, of which it gets its own."""
    norm: Any = copy.deepcopy(family.final_norm(model))
    assert norm is not None
    with torch.no_grad():
        norm.weight.copy_(s * (norm.weight.double() + family.norm_offset) - family.norm_offset)
        if getattr(norm, "bias", None) is not None:
            norm.bias.copy_(s * norm.bias.double())
    model.set_submodule(family.final_norm_path, norm)


def _mean_under(dense: Tensor, z: Tensor) -> float:
    """Sum over rows of the mean of ``z`` under softmax(dense)."""
    return float(torch.linalg.vecdot(dense.softmax(dim=-1), z).sum(dtype=torch.float64))
