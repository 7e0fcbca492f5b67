"""The sums over calibration tokens that a module's output solve is made of, and what it gives."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modegpt.decompositions.regression import Moments, Refit
from modegpt.methods.plus.streams import Split

Parts = dict[bool, Moments]
"""Moments by whether their tokens are held out."""


@dataclass
class Sums:
    """Moments of features (batch, sequence, num_features) and targets (batch, sequence, num_targets).

    Batch by batch. ``gain`` (num_targets,): of a norm behind the targets, as which they are summed then: an error e of
    a token's target t counts as ``gain e / rms(t)``, which is what it moves the norm's output by, to first order and
    but for its part along t, which counts although the norm takes it away. A target shorter than the window's median
    counts as if it were that long: what a norm makes of the first token's can be a thousand times longer, and no error
    moves its output by more than twice the whole.
    """

    split: Split
    parts: Parts
    gain: Tensor | None = None

    @classmethod
    def zeros(
        cls, split: Split, num_features: int, num_targets: int, *, device: torch.device, gain: Tensor | None = None
    ) -> "Sums":
        """No tokens yet."""
        parts = {held: Moments.zeros(num_features, num_targets, device=device) for held in (False, True)}
        return cls(split, parts, gain)

    def update(self, batch: int, z: Tensor, t: Tensor, *, constant: bool = False, tokens: Tensor | None = None) -> None:
        """Add a batch, or the rows z (k, num_features) and t (k, num_targets) of its ``tokens`` (k,) alone.

        With a ``constant`` feature of ones behind those of z.
        """
        if constant:
            z = torch.cat([z, z.new_ones(*z.shape[:2], 1)], dim=-1)
        if self.gain is not None:
            t = t.to(torch.promote_types(t.dtype, torch.float32))
            length = t.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=torch.finfo(t.dtype).tiny)
            length = torch.maximum(length, length.median(dim=1, keepdim=True).values)
            z, t = z / length, t * self.gain.to(t.dtype) / length
        for held, rows in self.split.parts(batch, z, t, tokens=tokens):
            self.parts[held] = self.parts[held].updated(*rows, add=self.split.world.add)

    def pool(self) -> None:
        """Bring the moments of all processes together; all batches are in."""
        if self.split.world.size == 1:
            return
        for held, part in self.parts.items():
            num_rows = part.energy.new_tensor(part.num_rows)
            self.split.world.pool([part.G, part.X, part.energy, num_rows])
            self.parts[held] = replace(part, num_rows=int(num_rows))

    @property
    def whole(self) -> Moments:
        """Of all tokens."""
        return self.parts[False] + self.parts[True]


@dataclass(frozen=True)
class Solution:
    """One way to cut a module.

    Args:
        kept: what stays of the module.
        reduce: from full moments to those of the kept features.
        refit: the output matrix, solved for these.
    """

    kept: Any
    reduce: Callable[[Moments], Moments]
    refit: Refit
