"""The three modules of a transformer layer as pairs of matrices, their calibration statistics, and the form of a variant.

Convention: row vectors, ``y = x W`` with W of shape (in, out). ``H`` query heads, ``H_kv`` key/value heads, ``g = H / H_kv``
(query head h reads key/value head ``h // g``), ``d`` head size, ``d_h`` hidden size, ``n`` MLP width.
Statistics are unnormalised float64 sums over calibration tokens; a field is None when it was not collected.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from modegpt.decompositions.linalg import all_finite
from modegpt.errors import UserError


@dataclass(frozen=True)
class LowRank:
    """A matrix stored as two factors, ``W ~= A @ B``: A (in, r), B (r, out)."""

    A: Tensor
    B: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.A.shape[0], self.B.shape[1]))


@dataclass(frozen=True)
class MLPWeights:
    """``h = act(x W_G + b_G) * (x W_U + b_U)`` (or ``act(x W_U + b_U)`` without gate), ``y = h W_D + b_D``.

    W_U, W_G (d_h, n); W_D (n, d_h); b_U, b_G (n,); b_D (d_h,).
    """

    W_U: Tensor | LowRank
    W_G: Tensor | LowRank | None
    W_D: Tensor | LowRank
    b_U: Tensor | None = None
    b_G: Tensor | None = None
    b_D: Tensor | None = None

    @property
    def inner_size(self) -> int:
        return self.W_D.shape[0]

    @property
    def rank_unit(self) -> int:
        return 1


@dataclass(frozen=True)
class QueryKeyWeights:
    """W_Q (H, d_h, d), W_K (H_kv, d_h, d), b_Q (H, d), b_K (H_kv, d).

    Under ``rope`` the dims ``(i, i + d/2)`` are one rotated pair, and ``rope_index`` (H_kv, d/2), int64, names the original
    frequency of each pair (None: all of them, in order).
    """

    W_Q: Tensor
    W_K: Tensor
    b_Q: Tensor | None = None
    b_K: Tensor | None = None
    rope: bool = True
    rope_index: Tensor | None = None

    @property
    def inner_size(self) -> int:
        return self.W_K.shape[-1]

    @property
    def rank_unit(self) -> int:
        return 2 if self.rope else 1


@dataclass(frozen=True)
class ValueOutputWeights:
    """W_V (H_kv, d_h, d), W_O (H, d, d_h), b_V (H_kv, d), b_O (d_h,)."""

    W_V: Tensor
    W_O: Tensor
    b_V: Tensor | None = None
    b_O: Tensor | None = None

    @property
    def inner_size(self) -> int:
        return self.W_V.shape[-1]

    @property
    def rank_unit(self) -> int:
        return 1


@dataclass(frozen=True)
class MLPStatistics:
    """C (n, n): Gram of h, the down projection's input; mean (n,) of h; C_x (d_h, d_h): Gram of the MLP's input."""

    C: Tensor | None = None
    mean: Tensor | None = None
    num_tokens: int = 0
    C_x: Tensor | None = None


@dataclass(frozen=True)
class QueryKeyStatistics:
    """C_Q (H, d, d), C_K (H_kv, d, d): Grams of the states entering the product (after bias, q/k norm and RoPE)."""

    C_Q: Tensor | None = None
    C_K: Tensor | None = None
    C_x: Tensor | None = None
    num_tokens: int = 0


@dataclass(frozen=True)
class ValueOutputStatistics:
    """G (H_kv, d, d): Gram of the value states; A (H, d, d): Gram of each query head's input to W_O; both without b_V."""

    G: Tensor | None = None
    A: Tensor | None = None
    C_x: Tensor | None = None
    num_tokens: int = 0


Weights = MLPWeights | QueryKeyWeights | ValueOutputWeights
Statistics = MLPStatistics | QueryKeyStatistics | ValueOutputStatistics


@dataclass(frozen=True)
class Reduction:
    """A reduced module.

    weights: in the dtype of the input weights. relative_error: squared error over the energy of the dense target, in the
    closed form that the variant's docstring names (never NaN). kept: indices of the kept inner dimensions, (k,) for the MLP and
    (H_kv, k) for heads, None where nothing is selected. numerics: what the solver had to do (jitter, dead channels,
    fallback), empty if nothing unusual; ready for JSON.
    """

    weights: Weights
    relative_error: float
    kept: Tensor | None = None
    numerics: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One way to reduce one module to an inner size; the fields of a subclass are its hyper-parameters.

    ``required`` names the statistics fields it reads. Subclasses implement ``reduce``; the call checks the request first and
    returns the very same weights at full rank. Raises UserError for a rank out of range or not whole pairs under RoPE, an
    inapplicable module, or a statistic that was not collected or is not finite.
    """

    required: ClassVar[frozenset[str]] = frozenset()

    def applicable(self, weights: Weights) -> str | None:
        """Why this variant cannot reduce these weights, or None."""
        if isinstance(weights, MLPWeights) and any(
            isinstance(W, LowRank) for W in (weights.W_U, weights.W_G, weights.W_D)
        ):
            return "the MLP is already stored as low-rank factors"
        return None

    def reduce(self, weights: Weights, statistics: Statistics, rank: int, generator: torch.Generator) -> Reduction:
        raise NotImplementedError

    def __call__(self, weights: Weights, statistics: Statistics, rank: int, generator: torch.Generator) -> Reduction:
        name, full, unit = type(self).__name__, weights.inner_size, weights.rank_unit
        if not 1 <= rank <= full:
            raise UserError(f"{name}: rank {rank} is not between 1 and the full inner size {full}")
        if rank % unit:
            raise UserError(f"{name}: rank {rank} splits a rotary pair; give an even rank")
        if rank == full:
            return Reduction(weights=weights, relative_error=0.0)
        if (reason := self.applicable(weights)) is not None:
            raise UserError(f"{name} does not apply: {reason}")
        missing = sorted(key for key in self.required if getattr(statistics, key) is None)
        if missing:
            raise UserError(f"{name} needs the statistics {', '.join(missing)}, which were not collected")
        for key in sorted(self.required):
            if not all_finite(getattr(statistics, key)):
                raise UserError(
                    f"{name}: the calibration statistic {key} holds NaN or inf; check the model's activations"
                )
        return self.reduce(weights, statistics, rank, generator)


def check_positive(owner: object, name: str, *, zero_allowed: bool = False) -> None:
    """UserError unless the hyper-parameter ``name`` of ``owner`` is positive (or zero, where allowed) and finite."""
    value = getattr(owner, name)
    if not (0 < value < float("inf") or (zero_allowed and value == 0)):
        bound = "at least 0" if zero_allowed else "positive"
        raise UserError(f"{type(owner).__name__}: {name} must be {bound} and finite, got {value}")
