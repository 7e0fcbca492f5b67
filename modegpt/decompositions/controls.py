"""Controls: dimensions kept by the size of their weights, or at random; no solve follows."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modegpt.decompositions.cr import cr_scores
from modegpt.decompositions.modules import (
    MLPStatistics,
    MLPWeights,
    QueryKeyStatistics,
    QueryKeyWeights,
    Reduction,
    ValueOutputStatistics,
    ValueOutputWeights,
    Variant,
)
from modegpt.decompositions.selection import (
    choose_query_key,
    group_heads,
    keep_mlp,
    keep_query_key,
    keep_value_output,
    largest,
    mlp_relative_error,
    query_key_relative_error,
    sum_pairs,
    value_output_relative_error,
)


def uniform_scores(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Independent uniform scores: their top-k is a uniformly random subset, the same on every device for a given generator."""
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device).to(device)


@dataclass(frozen=True)
class MLPControl(Variant):
    """Keep the best channels by ``scores``, slices of the dense weights. C serves the reported error alone, as for MLPNystrom."""

    required: ClassVar[frozenset[str]] = frozenset({"C"})

    def scores(self, weights: MLPWeights, generator: torch.Generator) -> Tensor:
        """(n,)"""
        raise NotImplementedError

    def reduce(
        self, weights: MLPWeights, statistics: MLPStatistics, rank: int, generator: torch.Generator
    ) -> Reduction:
        kept = largest(self.scores(weights, generator), rank)
        error = mlp_relative_error(statistics.C, weights.W_D, kept, weights.W_D[kept])
        return Reduction(keep_mlp(weights, kept), relative_error=error, kept=kept)


@dataclass(frozen=True)
class MLPMagnitude(MLPControl):
    """Channels of largest ``||W_U[:, j]|| ||W_G[:, j]|| ||W_D[j]||`` (without gate: two factors).

    Optimum: none. Cost: O(n d_h) FLOPs, plus 2 n^2 d_h for the reported error. Source: structured magnitude pruning.
    """

    def scores(self, weights: MLPWeights, generator: torch.Generator) -> Tensor:
        scores = weights.W_U.double().norm(dim=0) * weights.W_D.double().norm(dim=1)
        return scores if weights.W_G is None else scores * weights.W_G.double().norm(dim=0)


@dataclass(frozen=True)
class MLPRandom(MLPControl):
    """Channels uniformly at random. Optimum: none. Cost: none, plus 2 n^2 d_h FLOPs for the reported error. Source: control."""

    def scores(self, weights: MLPWeights, generator: torch.Generator) -> Tensor:
        return uniform_scores((weights.inner_size,), generator, weights.W_D.device)


@dataclass(frozen=True)
class QueryKeyControl(Variant):
    """Keep the best dims (whole pairs under RoPE) by ``scores``. The Grams serve the reported error alone, as for QueryKeyCR."""

    required: ClassVar[frozenset[str]] = frozenset({"C_Q", "C_K"})

    def scores(self, weights: QueryKeyWeights, generator: torch.Generator) -> Tensor:
        """(H_kv, d)"""
        raise NotImplementedError

    def reduce(
        self, weights: QueryKeyWeights, statistics: QueryKeyStatistics, rank: int, generator: torch.Generator
    ) -> Reduction:
        scores = self.scores(weights, generator)
        kept = choose_query_key(sum_pairs(scores) if weights.rope else scores, rank, rope=weights.rope)
        error = query_key_relative_error(statistics.C_Q, statistics.C_K, kept)
        return Reduction(keep_query_key(weights, kept), relative_error=error, kept=kept)


@dataclass(frozen=True)
class QueryKeyMagnitude(QueryKeyControl):
    """Dims of largest ``||W_Q[:, i]|| ||W_K[:, i]||``: QueryKeyCR with white inputs.

    Optimum: none. Cost: O((H + H_kv) d_h d) FLOPs. Source: structured magnitude pruning.
    """

    def scores(self, weights: QueryKeyWeights, generator: torch.Generator) -> Tensor:
        return cr_scores(*(W.double().square().sum(dim=1) for W in (weights.W_Q, weights.W_K)))


@dataclass(frozen=True)
class QueryKeyRandom(QueryKeyControl):
    """Dims (pairs under RoPE) at random per key head. Optimum: none. Cost: none. Source: control."""

    def scores(self, weights: QueryKeyWeights, generator: torch.Generator) -> Tensor:
        return uniform_scores((len(weights.W_K), weights.inner_size), generator, weights.W_K.device)


@dataclass(frozen=True)
class ValueOutputControl(Variant):
    """Keep the best value dims by ``scores``. G serves the reported error alone, as for ValueOutputSVD."""

    required: ClassVar[frozenset[str]] = frozenset({"G"})

    def scores(self, weights: ValueOutputWeights, generator: torch.Generator) -> Tensor:
        """(H_kv, d)"""
        raise NotImplementedError

    def reduce(
        self, weights: ValueOutputWeights, statistics: ValueOutputStatistics, rank: int, generator: torch.Generator
    ) -> Reduction:
        kept = largest(self.scores(weights, generator), rank)
        W_O = group_heads(weights.W_O.double(), len(weights.W_V))
        mask = torch.zeros(W_O.shape[0], W_O.shape[2], dtype=W_O.dtype, device=W_O.device).scatter(1, kept, 1.0)
        error = value_output_relative_error(statistics.G.double().unsqueeze(1), W_O, W_O * mask[:, None, :, None])
        return Reduction(keep_value_output(weights, kept), relative_error=error, kept=kept)


@dataclass(frozen=True)
class ValueOutputMagnitude(ValueOutputControl):
    """Value dims of largest ``||W_V[:, i]|| ||[W_O,1 ... W_O,g][i]||``.

    Optimum: none. Cost: O((H + H_kv) d_h d) FLOPs, plus 2 H d^2 d_h for the reported error. Source: structured magnitude pruning.
    """

    def scores(self, weights: ValueOutputWeights, generator: torch.Generator) -> Tensor:
        W_O = group_heads(weights.W_O.double(), len(weights.W_V))
        return weights.W_V.double().norm(dim=1) * W_O.norm(dim=(1, 3))


@dataclass(frozen=True)
class ValueOutputRandom(ValueOutputControl):
    """Value dims at random per value head. Optimum: none. Cost: none, plus that of the error. Source: control."""

    def scores(self, weights: ValueOutputWeights, generator: torch.Generator) -> Tensor:
        return uniform_scores((len(weights.W_V), weights.inner_size), generator, weights.W_V.device)
