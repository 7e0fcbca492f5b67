"""Type II, query-key: CR decomposition, a shared choice of columns of W_Q and W_K."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from modegpt.decompositions.attention import elimination_order
from modegpt.decompositions.linalg import relative
from modegpt.decompositions.modules import (
    HEAD_NORM_FIT,
    QueryKeySelection,
    QueryKeyVariant,
    QueryKeyWeights,
    Reduction,
    Statistics,
)
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
        products = group_heads(C_Q, len(C_K)).sum(dim=1) * self.seen_keys(statistics)
        blocks = products.reshape(len(C_K), unit, size // unit, unit, size // unit).sum(dim=(1, 3))
        gone, _ = elimination_order(blocks, (size - rank) // unit)
        alive = blocks.new_ones(blocks.shape[:2]).scatter(1, gone, 0.0)
        kept = choose_query_key(alive, rank, rope=weights.rope)
        error = query_key_relative_error(C_Q, C_K, kept)
        reduced, numerics = keep_query_key(weights, kept, statistics, head_norm=self.head_norm)
        return Reduction(reduced, relative_error=error, kept=kept, numerics=numerics)

    def seen_keys(self, statistics: Statistics) -> Tensor:
        """The Gram (H_kv, d, d) of keys by which logits are missed."""
        return statistics["query_key.C_K"].double()


@dataclass(frozen=True)
class QueryKeyEliminationCentred(QueryKeyElimination):
    """QueryKeyElimination by the error about the mean over keys, which adds one number to all logits of a query.

    Softmax takes no notice of that number, as long as a query sees keys whose mean is that of all.
    Optimum, relative_error, cost and source as there.
    """

    label: ClassVar[str] = "Greedy elimination, keys centred"
    required: ClassVar[frozenset[str]] = QueryKeyElimination.required | {"query_key.mean_K", "layer.num_tokens"}

    def seen_keys(self, statistics: Statistics) -> Tensor:
        """About the mean key."""
        mean = statistics["query_key.mean_K"].double()
        return super().seen_keys(statistics) - statistics["layer.num_tokens"] * mean.unsqueeze(2) * mean.unsqueeze(1)


@dataclass(frozen=True)
class QueryKeyShared(QueryKeyVariant):
    """One set of frequencies for all heads of all layers at this rank, so that stock engines run the smaller heads.

    The set is data-free: evenly spaced among the dense model's. Each head keeps the pairs that lose least when each is
    turned at the frequency of its new place: a pair of energy ``E_i = (C_Q,ii + C_Q,jj)(C_K,ii + C_K,jj)`` that moves
    from w to w' keeps ``E_i (2 c - 1)``, where c is the mean of ``cos((w - w') t)`` over the token distances t of a
    window of ``context``. Far beyond the context's wavelengths a pair moves for nothing, among short ones not at all.
    Optimum: of the diagonal error below, among the ways that keep the pairs in order.
    relative_error: ``1 - sum kept / sum E_i``; cross terms between pairs are left out, unlike in QueryKeyCR's.
    Cost: O(H_kv d^2) FLOPs, and O(d^2 context) for the means.
    Source: not the paper's; docs/serving.md has what sharing costs.
    """

    label: ClassVar[str] = "CR, one set of frequencies"
    required: ClassVar[frozenset[str]] = frozenset({"query_key.C_Q", "query_key.C_K"})
    context: int = 512

    def __post_init__(self) -> None:
        if self.context < 1:
            raise UserError(f"{type(self).__name__}: context must be at least 1 token, got {self.context}")

    def applicable(self, weights: QueryKeyWeights) -> str | None:
        """Frequencies are those of rotary pairs, and a head's norm would be its own."""
        if not weights.rope:
            return "there are no frequencies to share without RoPE"
        if weights.norm_Q is not None:
            return "heads that lost dims have norms of their own, which no engine's class knows"
        return super().applicable(weights)

    def reduce(
        self, weights: QueryKeyWeights, statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[QueryKeyWeights]:
        """Move the best pairs of each key head to the common frequencies."""
        assert weights.frequencies is not None, "whoever reads the weights of a rotary layer knows its frequencies"
        w = weights.frequencies.to(weights.W_K.device)
        energy_Q, energy_K = (
            sum_pairs(C.double().diagonal(dim1=-2, dim2=-1))
            for C in (statistics["query_key.C_Q"], statistics["query_key.C_K"])
        )
        energy = cr_scores(energy_Q, energy_K).square()
        places = torch.linspace(0, len(w) - 1, rank // 2, dtype=torch.float64).round().long().to(w.device)
        kept = energy.unsqueeze(-1) * (2 * self.agreement(w, w[places]) - 1)
        pairs, gain = in_order(kept)
        reduced, numerics = keep_query_key(
            weights, torch.cat((pairs, pairs + len(w)), dim=1), statistics, head_norm=HEAD_NORM_FIT
        )
        reduced = replace(reduced, rope_index=places.repeat(len(pairs), 1))
        error = relative(energy.sum() - gain.sum(), energy.sum())
        return Reduction(reduced, relative_error=error, numerics=numerics)

    def agreement(self, w: Tensor, others: Tensor) -> Tensor:
        """(n, m): the mean of ``cos((w - w') t)`` over pairs of tokens t = 0 .. context - 1 apart."""
        t = torch.arange(self.context, dtype=torch.float64, device=w.device)
        share = (self.context - t) / (self.context - t).sum()
        columns = [torch.cos((w.double() - other).unsqueeze(1) * t) @ share for other in others.double()]
        return torch.stack(columns, dim=1)


def in_order(gain: Tensor) -> tuple[Tensor, Tensor]:
    """The increasing choice of m of n that gains most where the k-th chosen gains ``gain[:, i, k]``.

    gain (H, n, m) with m <= n; returns the chosen (H, m) and what each of the H gains. By dynamic programming: the best
    that ends with i in place k follows the best that ends before i in place k - 1.
    """
    best, chosen_before = gain[:, :, 0], []
    for k in range(1, gain.shape[-1]):
        running = best.cummax(dim=1)
        chosen_before.append(running.indices.roll(1, dims=1))
        before = running.values.roll(1, dims=1)
        before[:, 0] = float("-inf")
        best = before + gain[:, :, k]
    last = best.argmax(dim=1, keepdim=True)
    chosen = [last]
    for before in reversed(chosen_before):
        chosen.insert(0, before.gather(1, chosen[0]))
    return torch.cat(chosen, dim=1), best.gather(1, last).squeeze(1)
