"""Streaming first and second moments of activations (pure torch)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from modegpt.decompositions.linalg import add_gram, mirror_blocks

CHUNK_ROWS = {torch.float64: 2048, torch.float32: 1024}
"""Rows per product, by its precision: bounds the float32 rounding of one chunk before it meets the float64 sum."""


@dataclass
class SecondMoment:
    """``C = sum x^T x`` over rows, accumulated in float64.

    Holds one Gram matrix per group: rows of shape (num_rows, num_groups, size) give ``value`` of shape
    (num_groups, size, size). Only blocks on and above the diagonal of ``sums`` are summed; ``value`` mirrors them.
    ``precision`` is that of each chunk's product: float64 is exact to rounding and costs about twice a
    float32 product on a CPU; float32 leaves a relative error near 1e-8 in the sum, enough to turn the
    smallest eigenvalues of a rank-deficient C negative.
    """

    sums: Tensor
    precision: torch.dtype = torch.float64

    @classmethod
    def zeros(
        cls, num_groups: int, size: int, *, device: torch.device | str = "cpu", precision: torch.dtype = torch.float64
    ) -> "SecondMoment":
        """The sums over no rows."""
        return cls(torch.zeros(num_groups, size, size, dtype=torch.float64, device=device), precision)

    @property
    def value(self) -> Tensor:
        """The sums so far, (num_groups, size, size): a view of the accumulator, whose lower blocks are filled in."""
        return mirror_blocks(self.sums)

    def update(self, rows: Tensor) -> None:
        """Add ``rows`` (num_rows, num_groups, size) to the sum.

        num_rows num_groups size^2 FLOPs, and those of the diagonal blocks.
        """
        for chunk in rows.split(CHUNK_ROWS[self.precision]):
            x = chunk.transpose(0, 1)
            # half-precision products are exact in float32, in which a GPU's matrix units sum them
            exact = x.is_cuda and x.itemsize == 2 and self.precision == torch.float32
            x = x.contiguous() if exact else x.to(self.precision)
            add_gram(self.sums, x, partial(torch.bmm, out_dtype=torch.float32) if exact else torch.bmm)


@dataclass
class FirstMoment:
    """``sum x`` over rows (num_rows, ...), accumulated in float64."""

    sums: Tensor

    @classmethod
    def zeros(cls, *size: int, device: torch.device | str = "cpu") -> "FirstMoment":
        """The sum over no rows, each of shape ``size``."""
        return cls(torch.zeros(size, dtype=torch.float64, device=device))

    @property
    def value(self) -> Tensor:
        """The sum so far."""
        return self.sums

    def update(self, rows: Tensor) -> None:
        """Add ``rows`` to the sum."""
        self.sums += rows.sum(dim=0, dtype=torch.float64)


@contextmanager
def beside(stream: torch.cuda.Stream | None, rows: Tensor) -> Iterator[None]:
    """Queue what happens inside on ``stream``, after all that the current stream was given so far; None: as usual.

    ``rows`` are what it reads: their memory is not given away before it has. Whoever reads the result on another stream
    makes that stream wait for ``stream`` first.
    """
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield
    rows.record_stream(stream)
