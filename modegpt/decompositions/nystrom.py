"""Type I, MLP: Nystrom approximation, its bias-corrected form, and its selection without the solve."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from modegpt.decompositions.linalg import energy, psd_cholesky, relative
from modegpt.decompositions.modules import MLPVariant, MLPWeights, Reduction, Sizes, Statistics, check_positive
from modegpt.decompositions.selection import keep_mlp, largest, mlp_relative_error, mlp_residual

CONSTANT = 1e-12  # centred energy of a channel, relative to its energy, under which it is a constant


def ridge_leverage(C: Tensor, ridge: float) -> Tensor:
    """Ridge leverage scores (n,) ``diag(C (C + lambda I)^-1) = 1 - lambda diag((C + lambda I)^-1)``, float64.

    C (n, n); ``lambda = ridge * mean(diag C)``. One Cholesky and its inverse, n^3 FLOPs.
    """
    lam = ridge * C.double().diagonal().mean()
    if lam <= 0:
        return torch.zeros(len(C), dtype=torch.float64, device=C.device)
    shifted = C.double().clone()
    shifted.diagonal().add_(lam)
    return 1 - lam * psd_cholesky(shifted).inverse_diagonal()


def refit(C: Tensor, W: Tensor, kept: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Least-squares map ``(C_SS)^+ C_S: W`` (k, m) from the kept channels to the dense output, and what the solver did.

    C (n, n), W (n, m), kept (k,). Split form ``W_S + C_SS^-1 C_SR W_R`` over the removed R: the identity part is exact,
    and where C_SS is singular the minimiser nearest to W_S is taken. k^3/3 + 2 k^2 m + 2 k (n - k) m FLOPs, float64.
    """
    C, W = C.double(), W.double()
    removed = torch.ones(len(C), dtype=torch.bool, device=C.device)
    removed[kept] = False
    rows = C[kept]
    factor = psd_cholesky(rows[:, kept])
    return W[kept] + factor.solve(rows[:, removed] @ W[removed]), factor.numerics


def reduce_to_channels(weights: MLPWeights[Tensor], C: Tensor, kept: Tensor) -> Reduction[MLPWeights[Tensor]]:
    """The MLP on the channels ``kept`` (k,), with W_D refitted by least squares."""
    W_D, numerics = refit(C, weights.W_D, kept)
    error = mlp_relative_error(C, weights.W_D, kept, W_D)
    return Reduction(keep_mlp(weights, kept, W_D=W_D), relative_error=error, kept=kept, numerics=numerics)


@dataclass(frozen=True)
class MLPLeverage(MLPVariant):
    """Keep the channels of largest ridge leverage."""

    required: ClassVar[frozenset[str]] = frozenset({"mlp.C"})
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        check_positive(self, "ridge")

    def kept(self, C: Tensor, rank: int) -> Tensor:
        """Ascending indices (rank,) of the channels that stay."""
        return largest(ridge_leverage(C, self.ridge), rank)

    def solver_elements(self, sizes: Sizes, rank: int) -> int:
        """The scores hold C + lambda I, its equilibrated form and its factor twice.

        The refit holds rows of C, and of k x k a block, its forms and its factor twice.
        """
        scores, solve = 4 * sizes.n**2, rank * sizes.n + 5 * rank**2
        return max(scores, solve) + 2 * sizes.n * sizes.d_h


@dataclass(frozen=True)
class MLPNystrom(MLPLeverage):
    """Keep the channels of largest ridge leverage and refit W_D: ``W_D <- (C_SS)^+ C_S: W_D``.

    Optimum: for the chosen set S, the least-squares optimum of ``||h W_D - h_S W'||^2`` on calibration data; S itself
    is a heuristic (leverage ignores W_D). relative_error: that squared error over ``||h W_D||^2``.
    Cost: n^3 FLOPs for the scores, k^3/3 + 2 k n d_h for the solve, 2 n^2 d_h for the error.
    Source: MoDeGPT (arXiv 2408.09632), Type I. The paper's ridge is unknown; here it is relative to mean(diag C).
    """

    label: ClassVar[str] = "Nyström"

    def reduce(
        self, weights: MLPWeights[Tensor], statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[MLPWeights[Tensor]]:
        """Choose by leverage, refit W_D."""
        C = statistics["mlp.C"]
        return reduce_to_channels(weights, C, self.kept(C, rank))


@dataclass(frozen=True)
class MLPNystromBias(MLPLeverage):
    """MLPNystrom with a constant feature in the regression: W_D is refitted on centred channels, b_D takes up the mean.

    ``Sigma = C - T mean mean^T``, ``W_D <- (Sigma_SS)^+ Sigma_S: W_D``, ``b_D <- b_D + mean W_D - mean_S W_D'`` (b_D is
    created where the family has none). Optimum: for the same S as MLPNystrom, the least-squares optimum over W' and
    bias, so the error is never larger. relative_error: over ``||h W_D||^2``, as for MLPNystrom.
    Cost: as MLPNystrom plus 2 n^2.
    Source: a variant of MoDeGPT Type I, not the paper (whose b_D stays).
    """

    label: ClassVar[str] = "Nyström, bias corrected"
    required: ClassVar[frozenset[str]] = frozenset({"mlp.C", "mlp.mean", "layer.num_tokens"})

    def reduce(
        self, weights: MLPWeights[Tensor], statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[MLPWeights[Tensor]]:
        """Choose by leverage, refit W_D and b_D."""
        C, mean, W_dense = statistics["mlp.C"].double(), statistics["mlp.mean"].double(), weights.W_D.double()
        kept = self.kept(C, rank)
        Sigma = centre(C, mean, statistics["layer.num_tokens"])
        W_D, numerics = refit(Sigma, W_dense, kept)
        R = mlp_residual(W_dense, kept, W_D)
        b_D = mean @ R if weights.b_D is None else weights.b_D.double() + mean @ R
        error = relative(energy(Sigma, R), energy(C, W_dense))
        return Reduction(keep_mlp(weights, kept, W_D=W_D, b_D=b_D), relative_error=error, kept=kept, numerics=numerics)

    def solver_elements(self, sizes: Sizes, rank: int) -> int:
        """Those of MLPNystrom, and the centred Gram."""
        return sizes.n**2 + super().solver_elements(sizes, rank)


def centre(C: Tensor, mean: Tensor, num_tokens: Tensor) -> Tensor:
    """Centred Gram ``C - T mean mean^T`` (n, n); rows of channels that are constant to rounding are zeroed."""
    Sigma = C - num_tokens * torch.outer(mean, mean)
    constant = Sigma.diagonal() <= CONSTANT * C.diagonal()
    return Sigma.masked_fill(constant.unsqueeze(0) | constant.unsqueeze(1), 0.0)


@dataclass(frozen=True)
class MLPColumns(MLPLeverage):
    """Keep the channels of largest ridge leverage; W_D keeps its rows, no solve.

    Optimum: none; the cost of leaving out the refit of MLPNystrom, same channels. relative_error: as MLPNystrom.
    Cost: n^3 FLOPs for the scores, 2 n^2 d_h for the error.
    Source: ablation of MoDeGPT Type I.
    """

    label: ClassVar[str] = "Columns"

    def reduce(
        self, weights: MLPWeights[Tensor], statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[MLPWeights[Tensor]]:
        """Choose by leverage, keep the rows of W_D."""
        C = statistics["mlp.C"]
        kept = self.kept(C, rank)
        error = mlp_relative_error(C, weights.W_D, kept, weights.W_D[kept])
        return Reduction(keep_mlp(weights, kept), relative_error=error, kept=kept)
