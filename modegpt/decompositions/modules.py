"""The three modules of a transformer layer as pairs of matrices, and the form of a variant that reduces one.

Convention: row vectors, ``y = x W`` with W of shape (in, out). ``H`` query heads, ``H_kv`` key/value heads,
``g = H / H_kv`` (query head h reads key/value head ``h // g``), ``d`` head size, ``d_h`` hidden size, ``n`` MLP width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from modegpt.decompositions.linalg import all_finite
from modegpt.errors import UserError

Statistics = Mapping[str, Tensor]
"""The calibration statistics of one layer by name, as ``calibration/statistics.py`` lists them."""


@dataclass(frozen=True)
class Sizes:
    """The letters of a layer: d_h hidden size, n MLP width, H query heads and H_kv key/value heads of size d.

    G_Q and G_K count the norms of queries and of keys, each of which is fitted on F_Q or F_K shares (those of the pairs
    that it spans, and the offset); with ``joint_norms`` one norm spans all heads. E counts experts.
    """

    d_h: int
    n: int
    H: int
    H_kv: int
    d: int
    joint_norms: bool = False
    E: int = 1

    @property
    def G_Q(self) -> int:
        """Norms of queries."""
        return 1 if self.joint_norms else self.H

    @property
    def G_K(self) -> int:
        """Norms of keys."""
        return 1 if self.joint_norms else self.H_kv

    @property
    def F_Q(self) -> int:
        """Shares that a norm of queries is fitted on."""
        return self.H // self.G_Q * self.d // 2 + 1

    @property
    def F_K(self) -> int:
        """Shares that a norm of keys is fitted on."""
        return self.H_kv // self.G_K * self.d // 2 + 1


@dataclass(frozen=True)
class LowRank:
    """A matrix stored as two factors, ``W ~= A @ B``: A (in, r), B (r, out)."""

    A: Tensor
    B: Tensor

    @property
    def shape(self) -> torch.Size:
        """That of the product, (in, out)."""
        return torch.Size((self.A.shape[0], self.B.shape[1]))


Matrix = TypeVar("Matrix", bound=Tensor | LowRank)


@dataclass(frozen=True)
class MLPWeights(Generic[Matrix]):
    """``h = act(x W_G + b_G) * (x W_U + b_U)`` (or ``act(x W_U + b_U)`` without gate), ``y = h W_D + b_D``.

    W_U, W_G (d_h, n); W_D (n, d_h); b_U, b_G (n,); b_D (d_h,).
    """

    W_U: Matrix
    W_G: Matrix | None
    W_D: Matrix
    b_U: Tensor | None = None
    b_G: Tensor | None = None
    b_D: Tensor | None = None

    @property
    def inner_size(self) -> int:
        """What a variant reduces: the width n."""
        return self.W_D.shape[0]

    @property
    def rank_unit(self) -> int:
        """Ranks are multiples of this."""
        return 1


@dataclass(frozen=True)
class ExpertWeights:
    """The MLPs of a layer's experts, all of one width and without biases."""

    experts: tuple[MLPWeights[Any], ...]

    @property
    def inner_size(self) -> int:
        """What a variant reduces: the width n of each expert."""
        return self.experts[0].inner_size

    @property
    def rank_unit(self) -> int:
        """Ranks are multiples of this."""
        return 1


@dataclass(frozen=True)
class HeadNorm:
    """What each head's states pass through before they are rotated: ``w_i q_i / sqrt(sum_j c_j q_j^2 + eps)``.

    w (heads, d), c (heads, d), eps (heads,). A family's RMSNorm has ``c = 1/d``; one over r kept dims whose weight is
    ``w sqrt(1 / (r c))`` and whose eps is ``eps / (r c)`` is the same map where c is one number a head.
    """

    w: Tensor
    c: Tensor
    eps: Tensor


@dataclass(frozen=True)
class QueryKeyWeights:
    """W_Q (H, d_h, d), W_K (H_kv, d_h, d), b_Q (H, d), b_K (H_kv, d).

    Under ``rope`` the dims ``(i, i + d/2)`` are one rotated pair, and ``rope_index`` (H_kv, d/2), int64, names the
    original frequency of each pair (None: all of them, in order). ``frequencies`` (d/2,): of the dense head's pairs, in
    radians a token, where the reader knew them. ``norm_Q`` and ``norm_K``: the norms of the heads, where the family has
    them.
    """

    W_Q: Tensor
    W_K: Tensor
    b_Q: Tensor | None = None
    b_K: Tensor | None = None
    rope: bool = True
    rope_index: Tensor | None = None
    frequencies: Tensor | None = None
    norm_Q: HeadNorm | None = None
    norm_K: HeadNorm | None = None

    @property
    def inner_size(self) -> int:
        """What a variant reduces: the head size d."""
        return self.W_K.shape[-1]

    @property
    def rank_unit(self) -> int:
        """Ranks are multiples of this."""
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
        """What a variant reduces: the head size d."""
        return self.W_V.shape[-1]

    @property
    def rank_unit(self) -> int:
        """Ranks are multiples of this."""
        return 1


Weights = MLPWeights[Any] | ExpertWeights | QueryKeyWeights | ValueOutputWeights
AnyWeights = TypeVar("AnyWeights", bound=Weights)


@dataclass(frozen=True)
class Reduction(Generic[AnyWeights]):
    """A reduced module.

    weights: in the dtype of the input weights. relative_error: squared error over the energy of the dense target, in
    the closed form that the variant's docstring names (never NaN). kept: indices of the kept inner dimensions, (k,) for
    the MLP and (H_kv, k) for heads, None where nothing is selected. numerics: what the solver had to do (jitter, dead
    channels, fallback), empty if nothing unusual; ready for JSON.
    """

    weights: AnyWeights
    relative_error: float
    kept: Tensor | None = None
    numerics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant(Generic[AnyWeights]):
    """One way to reduce one module to an inner size; the fields of a subclass are its hyper-parameters.

    ``label`` is its name in figures and tables, ``required`` names the statistics that it reads, and ``draws`` says
    that it uses the generator. Subclasses implement ``reduce`` and ``solver_elements``. A call checks the request first
    and returns the very same weights at full rank. It raises UserError for a rank out of range or not whole pairs under
    RoPE, an inapplicable module, or a statistic that was not collected or is not finite.
    """

    label: ClassVar[str]
    required: ClassVar[frozenset[str]] = frozenset()
    draws: ClassVar[bool] = False

    def applicable(self, weights: AnyWeights) -> str | None:
        """Why this variant cannot reduce these weights, or None."""
        return None

    def reduce(
        self, weights: AnyWeights, statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[AnyWeights]:
        """The module at inner size ``rank``, which is below the full one."""
        raise NotImplementedError

    def reads(self, *, head_norms: bool) -> frozenset[str]:
        """The statistics that it reads where queries and keys have ``head_norms``, or have none."""
        return self.required

    def solver_elements(self, sizes: Sizes, rank: int) -> int:
        """Float64 elements that ``reduce`` holds at most, beside the weights and the statistics."""
        raise NotImplementedError

    def __call__(
        self, weights: AnyWeights, statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[AnyWeights]:
        """Check the request, then reduce."""
        name, full, unit = type(self).__name__, weights.inner_size, weights.rank_unit
        if not 1 <= rank <= full:
            raise UserError(f"{name}: rank {rank} is not between 1 and the full inner size {full}")
        if rank % unit:
            raise UserError(f"{name}: rank {rank} splits a rotary pair; give an even rank")
        if rank == full:
            return Reduction(weights=weights, relative_error=0.0)
        if (reason := self.applicable(weights)) is not None:
            raise UserError(f"{name} does not apply: {reason}")
        read = self.reads(head_norms=isinstance(weights, QueryKeyWeights) and weights.norm_Q is not None)
        if missing := sorted(read - statistics.keys()):
            raise UserError(f"{name} needs the statistics {', '.join(missing)}, which were not collected")
        for key in sorted(read):
            if not all_finite(statistics[key]):
                raise UserError(
                    f"{name}: the calibration statistic {key} holds NaN or inf; check the model's activations"
                )
        return self.reduce(weights, statistics, rank, generator)


class MLPVariant(Variant[MLPWeights[Any]]):
    """A variant of the MLP."""

    def applicable(self, weights: MLPWeights[Any]) -> str | None:
        """Only whole matrices can be reduced."""
        if any(isinstance(matrix, LowRank) for matrix in (weights.W_U, weights.W_G, weights.W_D)):
            return "the MLP is already stored as low-rank factors"
        return None


class AttentionVariant(Variant[AnyWeights]):
    """A variant of a module of attention, whose matrices outweigh what is worked out for each head."""

    def solver_elements(self, sizes: Sizes, rank: int) -> int:
        """Six copies of the larger matrix, d_h x H d."""
        return 6 * sizes.d_h * sizes.H * sizes.d


HEAD_NORM_FIT = "pairs"
HEAD_NORM_FITS = (HEAD_NORM_FIT, "offset", "scale", "kept")
"""How the norm of a head is estimated from the dims that stay, see ``decompositions/head_norm.py``; first the best."""


class QueryKeyVariant(AttentionVariant[QueryKeyWeights]):
    """A variant of query-key."""


@dataclass(frozen=True)
class QueryKeySelection(QueryKeyVariant):
    """A variant that keeps dims as they are; ``head_norm`` says how the norm of a head that lost some is fitted."""

    head_norm: str = field(default=HEAD_NORM_FIT, kw_only=True, metadata={"before": HEAD_NORM_FIT})

    def __post_init__(self) -> None:
        if self.head_norm not in HEAD_NORM_FITS:
            raise UserError(
                f"{type(self).__name__}: head_norm must be one of {', '.join(HEAD_NORM_FITS)}, got {self.head_norm!r}"
            )

    def reads(self, *, head_norms: bool) -> frozenset[str]:
        """With the shares of each pair in the norm of its head."""
        return self.required | {"query_key.N_Q", "query_key.N_K"} if head_norms else self.required


class ValueOutputVariant(AttentionVariant[ValueOutputWeights]):
    """A variant of value-output."""


def check_positive(owner: object, name: str, *, zero_allowed: bool = False) -> None:
    """UserError unless the hyper-parameter ``name`` of ``owner`` is positive (or zero, where allowed) and finite."""
    value = getattr(owner, name)
    if not (0 < value < float("inf") or (zero_allowed and value == 0)):
        bound = "at least 0" if zero_allowed else "positive"
        raise UserError(f"{type(owner).__name__}: {name} must be {bound} and finite, got {value}")
