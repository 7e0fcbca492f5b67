"""Streaming first and second moments of activations (pure torch)."""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ROWS = 2048
"""Rows per product: bounds the float32 rounding of one chunk before it meets the float64 sum."""


@dataclass
class SecondMoment:
    """``C = sum x^T x`` over rows, accumulated in float64.

    Holds one Gram matrix per group: rows of shape (num_rows, num_groups, size) give ``value`` of shape
    (num_groups, size, size). ``precision`` is that of each chunk's product: float64 is exact to
    rounding and costs about twice a float32 product on a CPU; float32 leaves a relative error near
    1e-8 in the sum, enough to turn the smallest eigenvalues of a rank-deficient C negative.
    """

    value: Tensor
    precision: torch.dtype = torch.float64

    @classmethod
    def zeros(cls, num_groups: int, size: int, *, device: torch.device | str = "cpu", precision: torch.dtype = torch.float64) -> "SecondMoment":
        return cls(torch.zeros(num_groups, size, size, dtype=torch.float64, device=device), precision)

    def update(self, rows: Tensor) -> None:
        """Add ``rows`` (num_rows, num_groups, size) to the sum. FLOPs: 2 * num_rows * num_groups * size^2."""
        for chunk in rows.split(CHUNK_ROWS):
            x = chunk.to(self.precision).transpose(0, 1)
            self.value += torch.bmm(x.transpose(1, 2), x)


@dataclass
class FirstMoment:
    """``sum x`` over rows (num_rows, size), accumulated in float64."""

    value: Tensor

    @classmethod
    def zeros(cls, size: int, *, device: torch.device | str = "cpu") -> "FirstMoment":
        return cls(torch.zeros(size, dtype=torch.float64, device=device))

    def update(self, rows: Tensor) -> None:
        self.value += rows.sum(dim=0, dtype=torch.float64)
