"""Type II, query-key: CR decomposition, a shared choice of columns of W_Q and W_K."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modegpt.decompositions.attention import elimination_order
from modegpt.decompositions.modules import QueryKeySelection, QueryKeyWeights, Reduction, Statistics
from modegpt.decompositions.selection import (
    choose_query_key,
    group_heads,
    keep_query_key,
    query_key_relative_error,
    sum_pairs,
)
from modegpt.errors import UserError

SCORES = ("dims", "pairs")


def cr_scores(energy_Q: Tensor, energy_K: Tensor) -> Tensor:
    """CR score of each dim, (H_kv, d): ``sqrt(sum over the group of C_Q,ii * C_K,ii)``, float64.

    energy_Q (H, d) and energy_K (H_kv, d) are the diagonals of the Grams. Equals
    ``||C_Q^1/2[:, i]|| ||C_K^1/2[:, i]||``, since ``||C^1/2[:, i]||^2 = C_ii``; the query heads of a group enter by the
    root of the sum of squares.
    """
    grouped = group_heads(energy_Q.double(), len(energy_K)).sum(dim=1)
    return (grouped * energy_K.double()).clamp(min=0).sqrt()


@dataclass(frozen=True)
class QueryKeyCR(QueryKeySelection):
    """Keep, per key head, the dims of W_Q and W_K with the largest product of norms.

    Pairs (i, i + d/2) stay whole under RoPE.
    ``score="dims"``: the score of a pair is the sum of its two post-RoPE scores ``sqrt(C_Q,ii C_K,ii)`` (as restated
    from the paper).
    ``score="pairs"``: ``sqrt((C_Q,ii + C_Q,jj)(C_K,ii + C_K,jj))``, the same before and after rotation.
    The softmax scale of the original head size must be kept by the model. Biases are indexed with their
    columns.
    Optimum: none in general (exact when the kept and removed dims are orthogonal); column sampling with the norm bound
    of CR.
    relative_error: squared error of the logits over all token pairs, see ``query_key_relative_error``.
    Cost: O(H d) FLOPs for the scores, O(H d^2) for the error.
    Source: MoDeGPT (arXiv 2408.09632), Type II.
    """

    label: ClassVar[str] = "CR"
    required: ClassVar[frozenset[str]] = frozenset({"query_key.C_Q", "query_key.C_K"})
    score: str = "dims"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise UserError(f"{type(self).__name__}: score must be one of {', '.join(SCORES)}, got {self.score!r}")

    def applicable(self, weights: QueryKeyWeights) -> str | None:
        """The pair score needs rotary pairs."""
        if self.score == "pairs" and not weights.rope:
            return "the pair score needs rotary pairs, and this model has no RoPE; use score=dims"
        return super().applicable(weights)

    def reduce(
        self, weights: QueryKeyWeights, statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[QueryKeyWeights]:
        """Keep the dims or pairs of best score in each key head."""
        energy_Q, energy_K = (
            C.double().diagonal(dim1=-2, dim2=-1) for C in (statistics["query_key.C_Q"], statistics["query_key.C_K"])
        )
        if self.score == "pairs":
            scores = cr_scores(sum_pairs(energy_Q), sum_pairs(energy_K))
        else:
            scores = cr_scores(energy_Q, energy_K)
            scores = sum_pairs(scores) if weights.rope else scores
        kept = choose_query_key(scores, rank, rope=weights.rope)
        error = query_key_relative_error(statistics["query_key.C_Q"], statistics["query_key.C_K"], kept)
        reduced, numerics = keep_query_key(weights, kept, statistics, head_norm=self.head_norm)
        return Reduction(reduced, relative_error=error, kept=kept, numerics=numerics)


@dataclass(frozen=True)
class QueryKeyCRPairs(QueryKeyCR):
    """QueryKeyCR with the rotation-invariant pair score: optimum, cost and source as there. RoPE only."""

    label: ClassVar[str] = "CR, pair score"
    score: str = "pairs"


@dataclass(frozen=True)
class QueryKeyElimination(QueryKeySelection):
    """Drop dims (pairs under RoPE) of each key head one by one, always the one that the logits miss least.

    What dropping R costs is the squared error itself, ``tr(C_Q,RR C_K,RR)``, in which dims that add up or cancel count
    together; the CR scores are its diagonal. Needs nothing but the Grams that these read.
    Optimum: greedy, of each removal given those before.
    relative_error: as QueryKeyCR. Cost: O(H_kv d^3) FLOPs at most.
    Source: backward elimination on the error that docs/method.md, Type II, states; not the paper's.
    """

    label: ClassVar[str] = "Greedy elimination"
    required: ClassVar[frozenset[str]] = frozenset({"query_key.C_Q", "query_key.C_K"})

    def reduce(
        self, weights: QueryKeyWeights, statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[QueryKeyWeights]:
        """Eliminate dims or pairs in each key head."""
        C_Q, C_K = statistics["query_key.C_Q"].double(), statistics["query_key.C_K"].double()
        unit, size = weights.rank_unit, weights.inner_size
        products = group_heads(C_Q, len(C_K)).sum(dim=1) * C_K
        blocks = products.reshape(len(C_K), unit, size // unit, unit, size // unit).sum(dim=(1, 3))
        alive = torch.ones(blocks.shape[:2], dtype=torch.bool, device=blocks.device)
        for head, M in enumerate(blocks):
            gone, _ = elimination_order(M, (size - rank) // unit)
            alive[head, gone] = False
        kept = choose_query_key(alive.double(), rank, rope=weights.rope)
        error = query_key_relative_error(C_Q, C_K, kept)
        reduced, numerics = keep_query_key(weights, kept, statistics, head_norm=self.head_norm)
        return Reduction(reduced, relative_error=error, kept=kept, numerics=numerics)
