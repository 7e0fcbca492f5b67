"""The sums that a module's output solve is made of: over calibration tokens, plain and weighted by the loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modegpt.decompositions.regression import Moments, Refit
from modegpt.methods.plus.streams import Split

Parts = dict[bool, Moments]
"""Moments by whether their tokens are held out."""


@dataclass
class Sums:
    """Moments of features (batch, sequence, num_features) and targets (batch, sequence, num_targets), batch by batch.

    fisher: a weight of every token, (batch, sequence) a batch; ``weighted`` then holds the moments with rows so
    weighted. None: all alike.
    """

    split: Split
    plain: Parts
    precision: torch.dtype
    fisher: Sequence[Tensor] | None = None
    weighted: Parts = field(default_factory=dict)

    @classmethod
    def zeros(
        cls,
        split: Split,
        num_features: int,
        num_targets: int,
        *,
        device: torch.device,
        precision: torch.dtype,
        fisher: Sequence[Tensor] | None = None,
    ) -> "Sums":
        """No tokens yet."""

        def parts() -> Parts:
            return {held: Moments.zeros(num_features, num_targets, device=device) for held in (False, True)}

        return cls(split, parts(), precision, fisher, {} if fisher is None else parts())

    def update(self, batch: int, z: Tensor, t: Tensor, *, constant: bool = False, tokens: Tensor | None = None) -> None:
        """Add a batch, or the rows z (k, num_features) and t (k, num_targets) of its ``tokens`` (k,) alone.

        With a ``constant`` feature of ones behind those of z.
        """
        if constant:
            z = torch.cat([z, z.new_ones(*z.shape[:2], 1)], dim=-1)
        self._add(self.plain, batch, z, t, tokens)
        if self.fisher is not None:
            root = self.fisher[batch].to(z).sqrt().unsqueeze(-1)
            root = root if tokens is None else root.flatten(0, 1)[tokens]
            self._add(self.weighted, batch, z * root, t * root, tokens)

    def _add(self, parts: Parts, batch: int, z: Tensor, t: Tensor, tokens: Tensor | None) -> None:
        for held, rows in self.split.parts(batch, z, t, tokens=tokens):
            parts[held] = parts[held].updated(*rows, precision=self.precision)

    def blended(self, gamma: float) -> Parts:
        """``(1 - gamma) C + gamma (tr C / tr C_F) C_F`` of the plain moments C and the weighted C_F.

        The same total, moved to where the loss feels it.
        """
        if gamma == 0:
            return self.plain
        trace, weighted = (
            float(sum(part.G.trace() for part in parts.values())) for parts in (self.plain, self.weighted)
        )
        scale = gamma * trace / weighted if weighted > 0 else 0.0
        return {held: self.plain[held].scaled(1 - gamma) + self.weighted[held].scaled(scale) for held in self.plain}


@dataclass(frozen=True)
class Solution:
    """One way to cut a module.

    Args:
        kept: what stays of the module.
        reduce: from full moments to those of the kept features.
        refit: the output matrix, solved for these.
        gamma: share of the Fisher-weighted moments it was solved with.
    """

    kept: Any
    reduce: Callable[[Moments], Moments]
    refit: Refit
    gamma: float = 0.0

    @property
    def numerics(self) -> dict[str, Any]:
        """For the record."""
        return {**self.refit.report(), **({"fisher": self.gamma} if self.gamma else {})}


def best(sums: Sums, gammas: Sequence[float], solve: Callable[[Parts], Solution]) -> Solution:
    """``solve`` the sums blended by each of ``gammas``.

    Of several, the one whose fit errs least, weighted by the loss, on the held-out tokens.
    """
    solutions = [replace(solve(sums.blended(gamma)), gamma=gamma) for gamma in gammas]
    if len(solutions) == 1:
        return solutions[0]
    return min(solutions, key=lambda each: each.reduce(sums.weighted[True]).error(each.refit.fitted))
