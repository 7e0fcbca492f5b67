"""Type III, value-output: SVD of the product through the d x d Gram, and the SVD variants of the other modules."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modegpt.decompositions.linalg import PSDFactor, psd_cholesky, relative
from modegpt.decompositions.modules import (
    LowRank,
    MLPVariant,
    MLPWeights,
    QueryKeyVariant,
    QueryKeyWeights,
    Reduction,
    Sizes,
    Statistics,
    ValueOutputVariant,
    ValueOutputWeights,
)
from modegpt.decompositions.selection import build_value_output, group_heads, value_output_relative_error
from modegpt.errors import UserError


def product_svd(G: Tensor, W_O: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, PSDFactor]:
    """Best rank-k factors of the value-output product of each key/value head, in the metric of G.

    G (H_kv, d, d) with ``G = L L^T``; W_O (H_kv, g, d, d_h). ``M = L^T [W_O,1 ... W_O,g]``, U_k its top left singular
    vectors (from the d x d matrix ``M M^T``). Returns P ``= L^-T U_k`` (H_kv, d, k), B ``= U_k^T M`` (H_kv, g, k, d_h),
    all squared singular values, descending (H_kv, d), and the factor. 2 g d^2 d_h + O(d^3) FLOPs a head, float64.
    """
    factor = psd_cholesky(G)
    L = factor.root()
    MMt = L.mT @ torch.einsum("kgdm,kgem->kde", W_O, W_O) @ L
    eigenvalues, U = torch.linalg.eigh(MMt)
    U_k = U.flip(-1)[..., :rank]
    P = torch.linalg.solve_triangular(L.mT, U_k, upper=True)
    B = (L @ U_k).mT.unsqueeze(1) @ W_O
    return P, B, eigenvalues.flip(-1).clamp(min=0), factor


def balance(W_V: Tensor, W_O: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with equal norms of each column of W_V (H_kv, d_h, k) and its rows of W_O (H_kv, g, k, d_h).

    The whitened W_V and the W_O that undoes it differ by the root of the token count and more, which half precision
    would feel.
    """
    norm_V, norm_O = W_V.norm(dim=1), W_O.norm(dim=(1, 3))
    usable = (norm_V > 0) & (norm_O > 0)
    t = torch.where(usable, norm_O / norm_V, 1.0).sqrt()
    return W_V * t[:, None, :], W_O / t[:, None, :, None]


@dataclass(frozen=True)
class ValueOutputSVD(ValueOutputVariant):
    """Joint SVD of W_V and the output blocks of its group.

    ``W_V <- W_V L^-T U_k``, ``W_O <- U_k^T L^T W_O`` with ``G = L L^T``.
    Optimum: the global one of ``sum_h ||v W_O,h - v W'_h||^2`` at rank k, jointly over the query heads h of a group;
    equal to the paper's two SVDs through C^1/2 (d_h x d_h), of which only this d x d part matters.
    relative_error: dropped squared singular values over all. Cost: 2 H d^2 d_h + O(H_kv d^3) FLOPs; the paper's form
    takes O(d_h^3).
    Source: MoDeGPT (arXiv 2408.09632), Type III. Differs from the paper in form, and in the free scale between the
    factors (balanced).
    """

    label: ClassVar[str] = "SVD"
    required: ClassVar[frozenset[str]] = frozenset({"value_output.G"})

    def reduce(
        self, weights: ValueOutputWeights, statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[ValueOutputWeights]:
        """Truncate the product of each group."""
        W_O = group_heads(weights.W_O.double(), len(weights.W_V))
        P, B, squared, factor = product_svd(statistics["value_output.G"], W_O, rank)
        W_V, B = balance(weights.W_V.double() @ P, B)
        error = relative(squared[:, rank:].sum(), squared.sum())
        return Reduction(build_value_output(weights, W_V, B), relative_error=error, numerics=factor.numerics)


@dataclass(frozen=True)
class ValueOutputSVDPerHead(ValueOutputVariant):
    """Truncate each value head to its principal subspace before looking at W_O.

    ``W_V <- W_V V_k``, ``W_O <- V_k^T W_O``.
    Optimum: of ``||v - v'||^2`` (the values), not of the output; never better than ValueOutputSVD on its target.
    relative_error: on the target of ValueOutputSVD, ``sum_h ||v W_O,h - v' W_O,h||^2``, for comparison.
    Cost: O(H_kv d^3) + 2 H d^2 d_h FLOPs.
    Source: the order of truncation in public ports of MoDeGPT under grouped queries.
    """

    label: ClassVar[str] = "SVD, per head"
    required: ClassVar[frozenset[str]] = frozenset({"value_output.G"})

    def reduce(
        self, weights: ValueOutputWeights, statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[ValueOutputWeights]:
        """Truncate the values of each head."""
        G = statistics["value_output.G"].double()
        V_k = torch.linalg.eigh(G).eigenvectors.flip(-1)[..., :rank]
        W_O = group_heads(weights.W_O.double(), len(weights.W_V))
        B = V_k.mT.unsqueeze(1) @ W_O
        error = value_output_relative_error(G.unsqueeze(1), W_O, V_k.unsqueeze(1) @ B)
        return Reduction(build_value_output(weights, weights.W_V.double() @ V_k, B), relative_error=error)


@dataclass(frozen=True)
class ValueOutputSVDAttention(ValueOutputVariant):
    """ValueOutputSVD on the states that W_O really reads: values mixed by attention, Gram A_h of each query head h.

    Objective: ``sum_h ||a_h W_O,h - a_h P B_h||^2`` with one P per key/value head (W_V <- W_V P) and one B_h per query
    head. P is the joint optimum for the pooled Gram ``sum_h A_h``, then each B_h is its least-squares optimum for A_h.
    Optimum: global for multi-head attention; for grouped queries, where the joint problem has no closed form, the
    optimum over B_h given P, never worse than the pooled solution. relative_error: this objective over
    ``sum_h ||a_h W_O,h||^2``.
    Cost: 2 (g > 1: 4) H d^2 d_h + O(H d^3) FLOPs. Source: docs/method.md, last item of Type III; not the paper.
    """

    label: ClassVar[str] = "SVD, attention output"
    required: ClassVar[frozenset[str]] = frozenset({"value_output.A"})

    def reduce(
        self, weights: ValueOutputWeights, statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[ValueOutputWeights]:
        """Truncate the product of each group, then refit the output blocks of its heads."""
        A = group_heads(statistics["value_output.A"].double(), len(weights.W_V))
        W_O = group_heads(weights.W_O.double(), len(weights.W_V))
        P, B, _, pooled = product_svd(A.sum(dim=1), W_O, rank)
        numerics, P_g = pooled.numerics, P.unsqueeze(1)
        if W_O.shape[1] > 1:
            AP = A @ P_g
            own = psd_cholesky(P_g.mT @ AP)
            B = B + own.solve(AP.mT @ (W_O - P_g @ B))
            numerics = {key: value for key, value in (("pooled", pooled.numerics), ("per_head", own.numerics)) if value}
        error = value_output_relative_error(A, W_O, P_g @ B)
        W_V, B = balance(weights.W_V.double() @ P, B)
        return Reduction(build_value_output(weights, W_V, B), relative_error=error, numerics=numerics)


@dataclass(frozen=True)
class QueryKeySVD(QueryKeyVariant):
    """Low-rank logits where no RoPE stands between: SVD of ``L_Q^T L_K = U S V^T`` of the Gram roots, per key head.

    ``W_Q <- W_Q L_Q^-T U_k S_k^1/2``, ``W_K <- W_K L_K^-T V_k S_k^1/2``, biases likewise (the Grams are of the biased
    states). C_Q is the sum over the group, as if its query heads were stacked.
    Optimum: the global one of ``sum ||Q_h K^T - Q'_h K'^T||_F^2`` over all pairs of calibration tokens (causality
    ignored), also jointly for a group. relative_error: dropped squared singular values over all.
    Cost: O(H_kv d^3) + 2 (H + H_kv) d_h d k FLOPs.
    Source: docs/method.md, Type II, for models without RoPE; equal to the SVD of ``C_x^1/2 W_Q W_K^T C_x^1/2`` when
    there is no bias.
    """

    label: ClassVar[str] = "SVD"
    required: ClassVar[frozenset[str]] = frozenset({"query_key.C_Q", "query_key.C_K"})

    def applicable(self, weights: QueryKeyWeights) -> str | None:
        """Nothing may stand between queries and keys."""
        if weights.rope:
            return "RoPE rotates queries and keys between the two matrices, so their product is not one matrix; use cr"
        return super().applicable(weights)

    def reduce(
        self, weights: QueryKeyWeights, statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[QueryKeyWeights]:
        """Truncate the product of each key head and its query heads."""
        num_groups, group_size = len(weights.W_K), len(weights.W_Q) // len(weights.W_K)
        factor_Q = psd_cholesky(group_heads(statistics["query_key.C_Q"].double(), num_groups).sum(dim=1))
        factor_K = psd_cholesky(statistics["query_key.C_K"])
        L_Q, L_K = factor_Q.root(), factor_K.root()
        U, S, Vh = torch.linalg.svd(L_Q.mT @ L_K)
        root_S = S[:, None, :rank].sqrt()
        T_K = torch.linalg.solve_triangular(L_K.mT, Vh.mT[..., :rank] * root_S, upper=True)
        T_Q = torch.linalg.solve_triangular(L_Q.mT, U[..., :rank] * root_S, upper=True).repeat_interleave(
            group_size, dim=0
        )

        def mapped(W: Tensor, T: Tensor) -> Tensor:
            return (W.double() @ T).to(W.dtype)

        def mapped_bias(b: Tensor | None, T: Tensor) -> Tensor | None:
            return None if b is None else mapped(b.unsqueeze(1), T).squeeze(1)

        reduced = QueryKeyWeights(
            W_Q=mapped(weights.W_Q, T_Q),
            W_K=mapped(weights.W_K, T_K),
            b_Q=mapped_bias(weights.b_Q, T_Q),
            b_K=mapped_bias(weights.b_K, T_K),
            rope=False,
        )
        numerics = {key: value for key, value in (("Q", factor_Q.numerics), ("K", factor_K.numerics)) if value}
        error = relative((S[:, rank:] ** 2).sum(), (S**2).sum())
        return Reduction(reduced, relative_error=error, numerics=numerics)


@dataclass(frozen=True)
class MLPSVD(MLPVariant):
    """Each of W_U, W_G, W_D as two factors by its own truncated SVD; the width n and the biases stay.

    ``rank`` is the equivalent width k: each matrix gets the largest factor rank ``r = floor(k d_h / (d_h + n))`` whose
    factors store no more than the matrix would at width k. Raises UserError where r is 0.
    Optimum: of each weight's Frobenius error; it sees neither data nor the nonlinearity. relative_error: dropped
    squared singular values over all, summed over the matrices (weights, not outputs).
    Cost: O(n d_h^2) FLOPs a matrix (d_h <= n).
    Source: plain SVD, the baseline of MoDeGPT (arXiv 2408.09632).
    """

    label: ClassVar[str] = "SVD"

    def reduce(
        self, weights: MLPWeights[Tensor], statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[MLPWeights[LowRank]]:
        """Truncate each matrix."""
        n, d_h = weights.W_D.shape
        r = rank * d_h // (d_h + n)
        if r == 0:
            raise UserError(
                f"MLPSVD: width {rank} leaves no rank for two factors of a {d_h} x {n} matrix; compress less"
            )
        dropped = total = torch.zeros((), dtype=torch.float64, device=weights.W_D.device)

        def factored(W: Tensor) -> LowRank:
            nonlocal dropped, total
            U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
            root_S = S[:r].sqrt()
            A, B = U[:, :r] * root_S, root_S[:, None] * Vh[:r]
            dropped, total = dropped + (S[r:] ** 2).sum(), total + (S**2).sum()
            return LowRank(A=A.to(W.dtype), B=B.to(W.dtype))

        reduced = MLPWeights(
            W_U=factored(weights.W_U),
            W_G=None if weights.W_G is None else factored(weights.W_G),
            W_D=factored(weights.W_D),
            b_U=weights.b_U,
            b_G=weights.b_G,
            b_D=weights.b_D,
        )
        return Reduction(reduced, relative_error=relative(dropped, total), numerics={"factor_rank": r})

    def solver_elements(self, sizes: Sizes, rank: int) -> int:
        """One matrix in float64, its full SVD with the solver's room, and what is made of them."""
        return 14 * sizes.n * sizes.d_h
