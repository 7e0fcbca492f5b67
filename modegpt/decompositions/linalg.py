"""Float64 linear algebra on Gram matrices that may be singular or badly scaled, and that says what it had to do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

JITTERS = (0.0, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8)  # relative: the equilibrated matrix has a unit diagonal
SMALLEST_PIVOT = 1e-13  # a smaller squared pivot is rounding noise, and what it multiplies is noise too
DEAD = 1e-30  # energy of a channel, relative to the largest, under which it never fired
DEAD_SCALE = 1e-6  # amplitude given to a dead channel: last in every ordering, yet invertible
EIGENVALUE_FLOOR = 1e-8
BLOCK_ROWS = 1024
"""Larger matrices are worked on in blocks, which halves the FLOPs and the memory of what is symmetric or triangular."""

SYMMETRIC_BLOCK = {"cpu": 384, "cuda": 2048}
"""Columns of a block of a symmetric product: wide enough for its full rate, narrow enough to skip nearly half of it."""


def upper_blocks(C: Tensor) -> list[tuple[int, int]]:
    """First and last row of each block of a symmetric C (..., n, n); its columns are those from its first row on."""
    size, block = C.shape[-1], SYMMETRIC_BLOCK.get(C.device.type, 384)
    return [(start, min(start + block, size)) for start in range(0, size, block)]


def add_gram(
    C: Tensor,
    x: Tensor,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
    *,
    add: Callable[[Tensor, Tensor], object] = Tensor.add_,
) -> None:
    """Add ``x^T x`` of rows x (..., rows, n) to C (..., n, n), in place, by ``add``.

    Only ``upper_blocks`` are summed; ``mirror_blocks`` fills in the rest.
    """
    for start, stop in upper_blocks(C):
        add(C[..., start:stop, start:], product(x[..., start:stop].mT, x[..., start:]))


def mirror_blocks(C: Tensor) -> Tensor:
    """C (..., n, n), of which only ``upper_blocks`` were summed, with what is below them filled in, in place."""
    for start, stop in upper_blocks(C):
        C[..., stop:, start:stop] = C[..., start:stop, stop:].mT
    return C


@dataclass(frozen=True)
class PSDFactor:
    """``C = S (K_L K_L^T) S`` with S = diag(scale): lower is K_L (..., n, n), scale (..., n)."""

    lower: Tensor
    scale: Tensor
    numerics: dict[str, Any]

    def root(self) -> Tensor:
        """Lower-triangular L (..., n, n) with ``C = L L^T``."""
        return self.scale.unsqueeze(-1) * self.lower

    def solve(self, B: Tensor) -> Tensor:
        """``C^-1 B`` for B (..., n, m)."""
        scale = self.scale.unsqueeze(-1)
        return torch.cholesky_solve(B / scale, self.lower) / scale

    def inverse(self) -> Tensor:
        """``C^-1`` (..., n, n). n^3 2/3 FLOPs."""
        inverse = torch.cholesky_inverse(self.lower)
        for start in range(0, inverse.shape[-1], BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            inverse[..., rows, :] /= self.scale[..., rows].unsqueeze(-1) * self.scale.unsqueeze(-2)
        return inverse

    def inverse_diagonal(self) -> Tensor:
        """``diag(C^-1)`` (..., n)."""
        return inverse_diagonal(self.lower) / self.scale**2


def inverse_diagonal(L: Tensor) -> Tensor:
    """``diag((L L^T)^-1)`` (..., n) of a lower-triangular L (..., n, n): the squared column norms of ``L^-1``.

    Above ``BLOCK_ROWS`` by halves: with ``L = [[A, 0], [B, D]]`` the first half has the columns of ``A^-1`` and of
    ``D^-1 B A^-1``, so the inverse itself is never held. n^3/3 FLOPs; below, n^3 2/3.
    """
    half = L.shape[-1] // 2
    if L.shape[-1] <= BLOCK_ROWS:
        return torch.cholesky_inverse(L).diagonal(dim1=-2, dim2=-1)
    A, B, D = L[..., :half, :half], L[..., half:, :half], L[..., half:, half:]
    between = torch.linalg.solve_triangular(D, B, upper=False)
    between = torch.linalg.solve_triangular(A, between, upper=False, left=False)
    return torch.cat([inverse_diagonal(A) + between.square_().sum(dim=-2), inverse_diagonal(D)], dim=-1)


def channel_scales(C: Tensor) -> tuple[Tensor, Tensor]:
    """``(scale, dead)`` (..., n), float64: the amplitude of each channel of a Gram matrix C (..., n, n), finite.

    A dead channel (no energy) has a tiny one.
    """
    diagonal = C.diagonal(dim1=-2, dim2=-1).double()
    largest = diagonal.amax(dim=-1, keepdim=True).clamp(min=0)
    dead = diagonal <= DEAD * largest
    dead_scale = torch.where(largest > 0, DEAD_SCALE * largest.sqrt(), torch.ones_like(largest))
    return torch.where(dead, dead_scale, diagonal.clamp(min=0).sqrt()), dead


def equilibrate(C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Correlation form of a Gram matrix: ``(K, scale, dead)`` with ``C = S K S`` and a unit diagonal of K.

    C (..., n, n), finite; scale and dead are its ``channel_scales``. A dead channel becomes an identity row of K.
    """
    C = C.double()
    scale, dead = channel_scales(C)
    K = (C / scale.unsqueeze(-1)).div_(scale.unsqueeze(-2))
    if dead.any():
        K.masked_fill_(dead.unsqueeze(-1) | dead.unsqueeze(-2), 0.0)
    K.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return K, scale, dead


def psd_cholesky(C: Tensor) -> PSDFactor:
    """Cholesky factor of a positive semidefinite C (..., n, n), in float64, after diagonal equilibration.

    A matrix whose pivots reach rounding noise gets the smallest jitter of 1e-12 ... 1e-8 (relative to its unit
    diagonal) that makes it definite; if none does, its eigenvalues are floored at 1e-8 of the largest. What was done is
    in ``numerics``: ``jitter`` (largest used), ``num_jittered``, ``num_dead`` and ``num_floored`` (counts over the
    batch). Equilibration makes the jitter blind to outlier channels, which would inflate one relative to the mean
    diagonal. n^3/3 FLOPs a matrix.
    """
    K, scale, dead = equilibrate(C)
    del C  # which may be nobody else's
    flat = K.reshape(-1, *K.shape[-2:])
    lower: Tensor | None = None
    pending = torch.arange(len(flat), device=flat.device)
    numerics: dict[str, Any] = {"num_dead": int(dead.sum())} if dead.any() else {}
    for jitter in JITTERS:
        shifted = flat
        if jitter:
            shifted = flat[pending]
            shifted.diagonal(dim1=-2, dim2=-1).add_(jitter)
        factor, info = torch.linalg.cholesky_ex(shifted)
        del shifted
        definite = (info == 0) & (factor.diagonal(dim1=-2, dim2=-1).amin(dim=-1) ** 2 >= SMALLEST_PIVOT)
        if len(flat) == 1 and flat.shape[-1] > BLOCK_ROWS and definite.all():
            lower = factor  # one large matrix: no copy
        else:
            lower = torch.empty_like(flat) if lower is None else lower
            lower[pending[definite]] = factor[definite]
        del factor
        if jitter and definite.any():
            numerics["jitter"] = jitter
            numerics["num_jittered"] = numerics.get("num_jittered", 0) + int(definite.sum())
        pending = pending[~definite]
        if not len(pending):
            break
    assert lower is not None, "JITTERS is not empty"
    if len(pending):
        eigenvalues, vectors = torch.linalg.eigh(flat[pending])
        floored = torch.maximum(eigenvalues, EIGENVALUE_FLOOR * eigenvalues[..., -1:])
        lower[pending] = torch.linalg.cholesky((vectors * floored.unsqueeze(-2)) @ vectors.mT)
        numerics["num_floored"] = len(pending)
    return PSDFactor(lower=lower.reshape(K.shape), scale=scale, numerics=numerics)


def energy(C: Tensor, X: Tensor) -> Tensor:
    """``sum tr(X^T C X)`` over the batch, a scalar: the squared norm of ``x X`` over tokens x with Gram C (..., n, n).

    C is symmetric. 2 n^2 m FLOPs; above ``BLOCK_ROWS`` about n^2 m, as blocks above the diagonal are those below it.
    """
    n = C.shape[-1]
    if n <= BLOCK_ROWS:
        return (X * (C @ X)).sum()
    size, total = BLOCK_ROWS // 4, X.new_zeros(())
    for start in range(0, n, size):
        stop = min(start + size, n)
        rows = X[..., start:stop, :]
        total += (rows * (C[..., start:stop, start:stop] @ rows)).sum()
        total += 2 * (rows * (C[..., start:stop, :start] @ X[..., :start, :])).sum()
    return total


def all_finite(X: Tensor) -> bool:
    """Whether X holds neither NaN nor inf.

    One sum tells almost always, in a fraction of the time that it takes to look at every element.
    """
    return bool(torch.isfinite(X.sum())) or bool(torch.isfinite(X).all())


def relative(error: Tensor | float, total: Tensor | float) -> float:
    """Error / total as a float; rounding below zero counts as zero, and a target without energy has no error."""
    return max(float(error), 0.0) / float(total) if float(total) > 0 else 0.0
