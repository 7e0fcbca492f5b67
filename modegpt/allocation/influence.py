"""Block influence: how much a layer turns the residual stream."""

import torch
from torch import Tensor

from modegpt.errors import UserError


class BlockInfluence:
    """Streaming ``s = 1 - mean cos(x_in, x_out)`` over the tokens of one layer.

    Source: block influence of ShortGPT, as used by MoDeGPT (arXiv 2408.09632) for its allocation. Cosines and sum in float64.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.num_tokens = 0

    def update(self, x_in: Tensor, x_out: Tensor) -> None:
        """Add a batch: x_in, x_out (..., d_h), the residual stream entering and leaving the layer."""
        assert x_in.shape == x_out.shape, (x_in.shape, x_out.shape)
        cosines = torch.nn.functional.cosine_similarity(x_in.double(), x_out.double(), dim=-1, eps=1e-300)
        self.total += float(cosines.sum())
        self.num_tokens += cosines.numel()

    def value(self) -> float:
        """The influence in [0, 2]. Raises UserError when no token was seen or an activation was NaN or inf."""
        if not self.num_tokens:
            raise UserError("block influence: no calibration tokens were seen")
        influence = 1.0 - self.total / self.num_tokens
        if influence != influence:
            raise UserError("block influence: the residual stream holds NaN or inf")
        return influence
