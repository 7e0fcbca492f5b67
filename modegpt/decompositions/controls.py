"""Controls: dimensions kept by the size of their weights, or at random; no solve follows."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modegpt.decompositions.cr import cr_scores
from modegpt.decompositions.modules import (
    MLPVariant,
    MLPWeights,
    QueryKeySelection,
    QueryKeyWeights,
    Reduction,
    Sizes,
    Statistics,
    ValueOutputVariant,
    ValueOutputWeights,
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
    """Independent uniform scores, the same on every device. Their top k are a uniformly random subset."""
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device).to(device)


@dataclass(frozen=True)
class MLPControl(MLPVariant):
    """Keep the channels of best score, as slices. C serves the reported error alone, which is that of MLPNystrom."""

    required: ClassVar[frozenset[str]] = frozenset({"mlp.C"})

    def scores(self, weights: MLPWeights[Tensor], generator: torch.Generator) -> Tensor:
        """What ranks the channels, (n,)."""
        raise NotImplementedError

    def reduce(
        self, weights: MLPWeights[Tensor], statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[MLPWeights[Tensor]]:
        """Keep the channels of best score."""
        kept = largest(self.scores(weights, generator), rank)
        error = mlp_relative_error(statistics["mlp.C"], weights.W_D, kept, weights.W_D[kept])
        return Reduction(keep_mlp(weights, kept), relative_error=error, kept=kept)

    def solver_elements(self, sizes: Sizes, rank: int) -> int:
        """Six copies of a matrix: what scores and error take."""
        return 6 * sizes.n * sizes.d_h


@dataclass(frozen=True)
class MLPMagnitude(MLPControl):
    """Channels of largest ``||W_U[:, j]|| ||W_G[:, j]|| ||W_D[j]||`` (without gate: two factors).

    Optimum: none. Cost: O(n d_h) FLOPs, plus 2 n^2 d_h for the reported error. Source: structured magnitude pruning.
    """

    label: ClassVar[str] = "Magnitude"

    def scores(self, weights: MLPWeights[Tensor], generator: torch.Generator) -> Tensor:
        """Products of norms, (n,)."""
        scores: Tensor = weights.W_U.double().norm(dim=0) * weights.W_D.double().norm(dim=1)
        return scores if weights.W_G is None else scores * weights.W_G.double().norm(dim=0)


@dataclass(frozen=True)
class MLPRandom(MLPControl):
    """Channels uniformly at random.

    Optimum: none. Cost: none, plus 2 n^2 d_h FLOPs for the reported error. Source: control.
    """

    label: ClassVar[str] = "Random"
    draws: ClassVar[bool] = True

    def scores(self, weights: MLPWeights[Tensor], generator: torch.Generator) -> Tensor:
        """Uniform draws, (n,)."""
        return uniform_scores((weights.inner_size,), generator, weights.W_D.device)


@dataclass(frozen=True)
class QueryKeyControl(QueryKeySelection):
    """Keep the dims (pairs under RoPE) of best score. The Grams serve the reported error alone, that of QueryKeyCR."""

    required: ClassVar[frozenset[str]] = frozenset({"query_key.C_Q", "query_key.C_K"})

    def scores(self, weights: QueryKeyWeights, generator: torch.Generator) -> Tensor:
        """What ranks the dims of each head, (H_kv, d)."""
        raise NotImplementedError

    def reduce(
        self, weights: QueryKeyWeights, statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[QueryKeyWeights]:
        """Keep the dims or pairs of best score in each key head."""
        scores = self.scores(weights, generator)
        kept = choose_query_key(sum_pairs(scores) if weights.rope else scores, rank, rope=weights.rope)
        error = query_key_relative_error(statistics["query_key.C_Q"], statistics["query_key.C_K"], kept)
        reduced, numerics = keep_query_key(weights, kept, statistics, head_norm=self.head_norm)
        return Reduction(reduced, relative_error=error, kept=kept, numerics=numerics)


@dataclass(frozen=True)
class QueryKeyMagnitude(QueryKeyControl):
    """Dims of largest ``||W_Q[:, i]|| ||W_K[:, i]||``: QueryKeyCR with white inputs.

    Optimum: none. Cost: O((H + H_kv) d_h d) FLOPs. Source: structured magnitude pruning.
    """

    label: ClassVar[str] = "Magnitude"

    def scores(self, weights: QueryKeyWeights, generator: torch.Generator) -> Tensor:
        """Products of norms, (H_kv, d)."""
        return cr_scores(*(W.double().square().sum(dim=1) for W in (weights.W_Q, weights.W_K)))


@dataclass(frozen=True)
class QueryKeyRandom(QueryKeyControl):
    """Dims (pairs under RoPE) at random per key head. Optimum: none. Cost: none. Source: control."""

    label: ClassVar[str] = "Random"
    draws: ClassVar[bool] = True

    def scores(self, weights: QueryKeyWeights, generator: torch.Generator) -> Tensor:
        """Uniform draws, (H_kv, d)."""
        return uniform_scores((len(weights.W_K), weights.inner_size), generator, weights.W_K.device)


@dataclass(frozen=True)
class ValueOutputControl(ValueOutputVariant):
    """Keep the value dims of best score. G serves the reported error alone, that of ValueOutputSVD."""

    required: ClassVar[frozenset[str]] = frozenset({"value_output.G"})

    def scores(self, weights: ValueOutputWeights, generator: torch.Generator) -> Tensor:
        """What ranks the dims of each head, (H_kv, d)."""
        raise NotImplementedError

    def reduce(
        self, weights: ValueOutputWeights, statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[ValueOutputWeights]:
        """Keep the dims of best score in each value head."""
        kept = largest(self.scores(weights, generator), rank)
        W_O = group_heads(weights.W_O.double(), len(weights.W_V))
        mask = torch.zeros(W_O.shape[0], W_O.shape[2], dtype=W_O.dtype, device=W_O.device).scatter(1, kept, 1.0)
        G = statistics["value_output.G"].double().unsqueeze(1)
        error = value_output_relative_error(G, W_O, W_O * mask[:, None, :, None])
        return Reduction(keep_value_output(weights, kept), relative_error=error, kept=kept)


@dataclass(frozen=True)
class ValueOutputMagnitude(ValueOutputControl):
    """Value dims of largest ``||W_V[:, i]|| ||[W_O,1 ... W_O,g][i]||``.

    Optimum: none. Cost: O((H + H_kv) d_h d) FLOPs, plus 2 H d^2 d_h for the reported error.
    Source: structured magnitude pruning.
    """

    label: ClassVar[str] = "Magnitude"

    def scores(self, weights: ValueOutputWeights, generator: torch.Generator) -> Tensor:
        """Products of norms, (H_kv, d)."""
        W_O = group_heads(weights.W_O.double(), len(weights.W_V))
        scores: Tensor = weights.W_V.double().norm(dim=1) * W_O.norm(dim=(1, 3))
        return scores


@dataclass(frozen=True)
class ValueOutputRandom(ValueOutputControl):
    """Value dims at random per value head. Optimum: none. Cost: none, plus that of the error. Source: control."""

    label: ClassVar[str] = "Random"
    draws: ClassVar[bool] = True

    def scores(self, weights: ValueOutputWeights, generator: torch.Generator) -> Tensor:
        """Uniform draws, (H_kv, d)."""
        return uniform_scores((len(weights.W_V), weights.inner_size), generator, weights.W_V.device)
