"""Least squares from sums alone, with a ridge towards a known solution whose size is chosen on held-out rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modegpt.decompositions.linalg import add_gram, equilibrate, mirror_blocks, psd_cholesky, relative

RIDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
"""Relative ridges that ``held_out_refit`` tries beside the start itself (an infinite ridge)."""


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
        def empty(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        return cls(G=empty(num_features, num_features), X=empty(num_features, num_targets), energy=empty(), num_rows=0)

    def updated(self, z: Tensor, t: Tensor, *, precision: torch.dtype) -> "Moments":
        """With the rows z (rows, m) and t (rows, p) added, in place. rows m (m + 2 p) FLOPs in ``precision``, and those of the diagonal blocks."""
        z, t = z.to(precision), t.to(precision)
        add_gram(self.G, z)
        mirror_blocks(self.G)
        self.X.add_(z.mT @ t)
        self.energy.add_(t.double().square().sum())
        return replace(self, num_rows=self.num_rows + len(z))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.G + other.G, self.X + other.X, self.energy + other.energy, self.num_rows + other.num_rows)

    def scaled(self, factor: float) -> "Moments":
        """The moments with every row counting ``factor`` times."""
        return replace(self, G=factor * self.G, X=factor * self.X, energy=factor * self.energy)

    def mapped(self, P: Tensor) -> "Moments":
        """The moments of the features ``z P``, P (m, k)."""
        return replace(self, G=P.mT @ (self.G @ P), X=P.mT @ self.X)

    def kept(self, S: Tensor) -> "Moments":
        """The moments of the features S (k,) alone."""
        return replace(self, G=self.G[S][:, S], X=self.X[S])

    def aimed(self, W: Tensor) -> "Moments":
        """The moments with the features' own image ``z W`` (W (m, p)) as the target."""
        X = self.G @ W
        return replace(self, X=X, energy=(W * X).sum())

    def error(self, W: Tensor) -> float:
        """``sum ||z W - t||^2`` for W (m, p), not below zero."""
        return max(float((W * (self.G @ W)).sum() - 2 * (W * self.X).sum() + self.energy), 0.0)


def ridge_towards(moments: Moments, W_0: Tensor, ridges: Sequence[float]) -> Iterator[tuple[Tensor, dict]]:
    """For each of ``ridges`` ``argmin_W sum ||z W - t||^2 + ridge ||D^1/2 (W - W_0)||^2`` with ``D = diag(G)``, and the solver's numerics.

    ``W_0 + (G + ridge D)^-1 (X - G W_0)``: D makes the ridge blind to the features' scales. 2 m^2 p FLOPs, and m^3/3 + 2 m^2 p a ridge, float64.
    """
    _, scale, _ = equilibrate(moments.G)
    missing = moments.X - moments.G @ W_0
    for ridge in ridges:
        G = moments.G.clone()
        G.diagonal().add_(ridge * scale**2)
        factor = psd_cholesky(G)
        yield W_0 + factor.solve(missing), factor.numerics


@dataclass(frozen=True)
class Refit:
    """W (m, p) solved on all rows, ``fitted`` on those to fit on; ridge chosen (inf: the start); held_out: relative errors of start and choice on the held-out rows."""

    W: Tensor
    fitted: Tensor
    ridge: float
    held_out: tuple[float, float]
    numerics: dict

    def report(self) -> dict:
        """For the record."""
        ridge = "kept the start" if self.ridge == float("inf") else self.ridge
        return {"ridge": ridge, "held_out": list(self.held_out), **self.numerics}


def held_out_refit(fit: Moments, held: Moments, start: tuple[Tensor, Tensor], ridges: Sequence[float] = RIDGES) -> Refit:
    """``ridge_towards`` on the rows of ``fit`` and ``held`` together, the ridge being the one that errs least on ``held`` when solved on ``fit``.

    start: W_0 from the rows of ``fit`` alone, and from all rows. Keeping the start is one of the choices, so the choice never does
    worse than it on the held-out rows. Ties go to the larger ridge. With r ridges: r + 1 times the cost of one solve, plus 2 r m^2 p FLOPs.
    """
    W_fit, W_all = start
    before = best = held.error(W_fit)
    chosen, fitted = float("inf"), W_fit
    descending = sorted(ridges, reverse=True)
    for ridge, (W, _) in zip(descending, ridge_towards(fit, W_fit, descending), strict=True):
        error = held.error(W)
        if error < best:
            best, chosen, fitted = error, ridge, W
    errors = (relative(before, held.energy), relative(best, held.energy))
    if chosen == float("inf"):
        return Refit(W_all, fitted, chosen, errors, {})
    [(W, numerics)] = ridge_towards(fit + held, W_all, [chosen])
    return Refit(W, fitted, chosen, errors, numerics)
