"""Least squares from sums alone, with a ridge towards a known solution whose size is chosen on held-out rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modegpt.decompositions.linalg import add_gram, channel_scales, energy, mirror_blocks, psd_cholesky, relative

RIDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Relative ridges among which ``held_out_refit`` searches, beside the start itself (an infinite ridge)."""

CHUNK_ROWS = 4096
"""Of a product in float32, which bounds its rounding before it meets a float64 sum."""

FIRST_RIDGE = RIDGES.index(1e-1)
"""Where the search begins."""


@dataclass(frozen=True)
class Moments:
    """What a regression of targets T on features z needs of its rows: float64 sums.

    G (m, m) ``sum z^T z``; X (m, p) ``sum z^T t``; energy ``sum ||t||^2``; num_rows.
    """

    G: Tensor
    X: Tensor
    energy: Tensor
    num_rows: int

    @classmethod
    def zeros(cls, num_features: int, num_targets: int, *, device: torch.device | str = "cpu") -> "Moments":
        """The moments of no rows."""

        def empty(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        return cls(G=empty(num_features, num_features), X=empty(num_features, num_targets), energy=empty(), num_rows=0)

    def updated(self, z: Tensor, t: Tensor, *, add: Callable[[Tensor, Tensor], object] = Tensor.add_) -> "Moments":
        """With the rows z (rows, m) and t (rows, p) added, in place, by ``add``.

        Products are in float32, or as wide as the rows are, by ``CHUNK_ROWS``. rows m (m + 2 p) FLOPs, and those of the
        diagonal blocks.
        """
        z, t = (rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in (z, t))
        add_gram(self.G, z, _by_chunks, add=add)
        mirror_blocks(self.G)
        add(self.X, _by_chunks(z.mT, t))
        add(self.energy, t.double().square().sum())
        return replace(self, num_rows=self.num_rows + len(z))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.G + other.G, self.X + other.X, self.energy + other.energy, self.num_rows + other.num_rows)

    def mapped(self, P: Tensor) -> "Moments":
        """The moments of the features ``z P``, P (m, k)."""
        return replace(self, G=P.mT @ (self.G @ P), X=P.mT @ self.X)

    def kept(self, S: Tensor) -> "Moments":
        """The moments of the features S (k,) alone, ascending; of all features these themselves."""
        if len(S) == len(self.G):
            return self
        return replace(self, G=self.G[S][:, S], X=self.X[S])

    def aimed(self, W: Tensor) -> "Moments":
        """The moments with the features' own image ``z W`` (W (m, p)) as the target."""
        X = self.G @ W
        return replace(self, X=X, energy=(W * X).sum())

    def error(self, W: Tensor) -> float:
        """``sum ||z W - t||^2`` for W (m, p), not below zero."""
        return max(float(energy(self.G, W) - 2 * (W * self.X).sum() + self.energy), 0.0)


def _by_chunks(A: Tensor, B: Tensor) -> Tensor:
    """``A B`` for A (m, rows) and B (rows, p), whose rounding does not grow with the number of rows."""
    if len(B) <= CHUNK_ROWS:
        return A @ B
    total = torch.zeros(len(A), B.shape[1], dtype=torch.float64, device=B.device)
    for start in range(0, len(B), CHUNK_ROWS):
        total += A[:, start : start + CHUNK_ROWS] @ B[start : start + CHUNK_ROWS]
    return total


def ridge_towards(moments: Moments, W_0: Tensor) -> Callable[[float], tuple[Tensor, dict[str, Any]]]:
    """From a ridge to ``argmin_W sum ||z W - t||^2 + ridge ||D^1/2 (W - W_0)||^2``, D = diag(G), and the numerics.

    ``W_0 + (G + ridge D)^-1 (X - G W_0)``: D makes the ridge blind to the features' scales.
    2 m^2 p FLOPs, and m^3/3 + 2 m^2 p a ridge, float64.
    """
    missing = moments.X - moments.G @ W_0

    def solve(ridge: float) -> tuple[Tensor, dict[str, Any]]:
        factor = psd_cholesky(_ridged(moments.G.clone(), ridge))
        return W_0 + factor.solve(missing), factor.numerics

    return solve


def _ridged(G: Tensor, ridge: float) -> Tensor:
    """``G + ridge D`` with D = diag(G), in place."""
    scale, _ = channel_scales(G)
    G.diagonal().add_(ridge * scale**2)
    return G


def _solve_all(fit: Moments, held: Moments, W_0: Tensor, ridge: float) -> tuple[Tensor, dict[str, Any]]:
    """``ridge_towards`` on all rows at one ridge, without a Gram matrix beside the one that is factored."""
    G = [fit.G + held.G]  # which goes with its last reader
    missing = fit.X + held.X - G[0] @ W_0
    factor = psd_cholesky(_ridged(G.pop(), ridge))
    return W_0 + factor.solve(missing), factor.numerics


@dataclass(frozen=True)
class Refit:
    """W (m, p) solved on all rows, ``fitted`` on those to fit on, and the ridge that was chosen (inf: the start).

    held_out: relative errors of start and choice on the held-out rows.
    """

    W: Tensor
    fitted: Tensor
    ridge: float
    held_out: tuple[float, float]
    numerics: dict[str, Any]

    def report(self) -> dict[str, Any]:
        """For the record."""
        ridge = "kept the start" if self.ridge == float("inf") else self.ridge
        return {"ridge": ridge, "held_out": list(self.held_out), **self.numerics}


def held_out_refit(fit: Moments, held: Moments, start: tuple[Tensor, Tensor]) -> Refit:
    """``ridge_towards`` on all rows, at the ridge that errs least on those of ``held`` when solved on those of ``fit``.

    start: W_0 from the rows of ``fit`` alone, and from all rows. Keeping the start is one of the choices, so the choice
    never does worse than it on the held-out rows. As a rule the error falls and then rises with the ridge: from
    ``FIRST_RIDGE`` the search walks down that slope, and stops where it rises again. Ties go to the larger ridge.
    About four times the cost of one solve, plus 6 m^2 p FLOPs.
    """
    W_fit, W_all = start
    solve, before = ridge_towards(fit, W_fit), held.error(W_fit)

    def tried(place: int) -> tuple[float, Tensor]:
        W, _ = solve(RIDGES[place])
        return held.error(W), W

    place, (best, fitted) = FIRST_RIDGE, tried(FIRST_RIDGE)
    for step in (1, -1):
        while 0 <= place + step < len(RIDGES):
            error, W = tried(place + step)
            if error > best or (error == best and step < 0):
                break
            place, best, fitted = place + step, error, W
        if place > FIRST_RIDGE:
            break
    if before <= best:
        return Refit(W_all, W_fit, float("inf"), (relative(before, held.energy),) * 2, {})
    W, numerics = _solve_all(fit, held, W_all, RIDGES[place])
    return Refit(W, fitted, RIDGES[place], (relative(before, held.energy), relative(best, held.energy)), numerics)
