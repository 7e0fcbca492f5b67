"""Block influence: how much a layer turns the residual stream."""

from functools import reduce
from operator import add

import torch
from torch import Tensor

from modegpt.errors import UserError

CACHED_ROWS = 128
"""Tokens at a time on a CPU, whose float64 copies then stay in its cache."""


class BlockInfluence:
    """Streaming ``s = 1 - mean cos(x_in, x_out)`` over the tokens of one layer.

    Source: block influence of ShortGPT, as used by MoDeGPT (arXiv 2408.09632) for its allocation. Cosines and sum in
    float64.
    """

    def __init__(self) -> None:
        self.totals: list[float] = []
        """The sum of cosines of each batch."""
        self.num_tokens = 0

    def update(self, x_in: Tensor, x_out: Tensor) -> None:
        """Add a batch: x_in, x_out (..., d_h), the residual stream entering and leaving the layer."""
        assert x_in.shape == x_out.shape, (x_in.shape, x_out.shape)
        size = x_in.shape[-1]
        num_rows = CACHED_ROWS if x_in.device.type == "cpu" else x_in.numel() // size
        pairs = zip(*(torch.split(x.reshape(-1, size), num_rows) for x in (x_in, x_out)), strict=True)
        cosines = torch.cat(
            [torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1, eps=1e-300) for a, b in pairs]
        )
        self.totals.append(float(cosines.sum()))
        self.num_tokens += cosines.numel()

    def value(self) -> float:
        """The influence in [0, 2]. Raises UserError when no token was seen or an activation was NaN or inf."""
        if not self.num_tokens:
            raise UserError("block influence: no calibration tokens were seen")
        influence = 1.0 - reduce(add, self.totals) / self.num_tokens
        if influence != influence:
            raise UserError("block influence: the residual stream holds NaN or inf")
        return influence
