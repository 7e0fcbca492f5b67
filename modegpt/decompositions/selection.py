"""Keeping a subset of a module's inner dimensions: choosing by score, slicing the weights, measuring what is lost."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modegpt.decompositions.head_norm import keep_head_norms
from modegpt.decompositions.linalg import energy, relative
from modegpt.decompositions.modules import MLPWeights, QueryKeyWeights, Statistics, ValueOutputWeights


def largest(scores: Tensor, k: int) -> Tensor:
    """Ascending indices (..., k) of the k largest scores (..., m); ties go to the lower index on every device."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(dim=-1).values


def group_heads(per_head: Tensor, num_groups: int) -> Tensor:
    """(H, ...) to (H_kv, g, ...): the query heads of each key/value head."""
    return per_head.reshape(num_groups, -1, *per_head.shape[1:])


def keep_mlp(
    weights: MLPWeights[Tensor], kept: Tensor, *, W_D: Tensor | None = None, b_D: Tensor | None = None
) -> MLPWeights[Tensor]:
    """Keep the channels ``kept`` (k,); W_D (k, d_h) and b_D (d_h,) replace the slices of the old ones where given."""

    def columns(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[..., kept]

    return MLPWeights(
        W_U=weights.W_U[:, kept],
        W_G=columns(weights.W_G),
        W_D=weights.W_D[kept] if W_D is None else W_D.to(weights.W_D.dtype),
        b_U=columns(weights.b_U),
        b_G=columns(weights.b_G),
        b_D=weights.b_D if b_D is None else b_D.to(weights.W_D.dtype),
    )


def mlp_residual(W_D: Tensor, kept: Tensor, W_D_kept: Tensor) -> Tensor:
    """R (n, d_h) with ``h W_D - h_S W_D_kept = h R``, float64."""
    R = W_D.double().clone()
    R[kept] -= W_D_kept.double()
    return R


def mlp_relative_error(C: Tensor, W_D: Tensor, kept: Tensor, W_D_kept: Tensor) -> float:
    """``||h W_D - h_S W_D_kept||^2 / ||h W_D||^2`` over the calibration tokens, from the Gram C (n, n) of h."""
    C = C.double()
    return relative(energy(C, mlp_residual(W_D, kept, W_D_kept)), energy(C, W_D.double()))


def choose_query_key(scores: Tensor, rank: int, *, rope: bool) -> Tensor:
    """Kept dims (H_kv, rank): the best pairs under RoPE (scores (H_kv, d/2)), else the best dims (scores (H_kv, d))."""
    if not rope:
        return largest(scores, rank)
    pairs = largest(scores, rank // 2)
    return torch.cat([pairs, pairs + scores.shape[-1]], dim=-1)


def sum_pairs(scores: Tensor) -> Tensor:
    """(..., d) to (..., d/2): the sum over each rotated pair (i, i + d/2)."""
    first, second = scores.chunk(2, dim=-1)
    return first + second


def keep_query_key(
    weights: QueryKeyWeights, kept: Tensor, statistics: Statistics, *, head_norm: str
) -> tuple[QueryKeyWeights, dict[str, Any]]:
    """Keep the dims ``kept`` (H_kv, k) of each key head and of the query heads that read it.

    The norms of heads, where there are any, are fitted on ``statistics`` as ``head_norm`` says; also returns how well.
    """
    num_groups, num_heads = len(weights.W_K), len(weights.W_Q)
    query_kept = kept.repeat_interleave(num_heads // num_groups, dim=0)
    rope_index = None
    if weights.rope:
        pairs = kept[:, : kept.shape[1] // 2]
        rope_index = pairs if weights.rope_index is None else weights.rope_index.gather(-1, pairs)
    norms, numerics = keep_head_norms(weights, kept[:, : kept.shape[1] // 2], statistics, fit=head_norm)
    reduced = replace(
        weights,
        W_Q=take_columns(weights.W_Q, query_kept),
        W_K=take_columns(weights.W_K, kept),
        b_Q=None if weights.b_Q is None else weights.b_Q.gather(-1, query_kept),
        b_K=None if weights.b_K is None else weights.b_K.gather(-1, kept),
        rope_index=rope_index,
        **norms,
    )
    return reduced, numerics


def query_key_relative_error(C_Q: Tensor, C_K: Tensor, kept: Tensor) -> float:
    """``sum ||Q K^T - Q_S K_S^T||_F^2 / sum ||Q K^T||_F^2`` over query heads and all pairs of calibration tokens.

    ``||Q_R K_R^T||_F^2 = tr(C_Q[R, R] C_K[R, R])`` for the removed dims R, with the Grams C_Q (H, d, d) and
    C_K (H_kv, d, d) of the states that enter the product. Causality is ignored: a token pair counts wherever its tokens
    stand.
    """
    C_Q, C_K = group_heads(C_Q.double(), len(C_K)).sum(dim=1), C_K.double()
    removed = torch.ones(C_K.shape[:2], dtype=torch.bool, device=C_K.device).scatter(1, kept, False).double()
    product = C_Q * C_K
    lost = product * removed.unsqueeze(-1) * removed.unsqueeze(-2)
    return relative(lost.sum(), product.sum())


def fold_value_bias(weights: ValueOutputWeights) -> Tensor | None:
    """Output bias (d_h,) that replaces b_V exactly.

    Attention rows sum to 1, so b_V adds the constant ``sum_h b_V W_O,h``.
    """
    if weights.b_V is None:
        return weights.b_O
    W_O = group_heads(weights.W_O.double(), len(weights.W_V))
    constant = torch.einsum("kd,kgdm->m", weights.b_V.double(), W_O)
    if weights.b_O is not None:
        constant = constant + weights.b_O.double()
    return constant.to(weights.W_O.dtype)


def build_value_output(weights: ValueOutputWeights, W_V: Tensor, W_O: Tensor) -> ValueOutputWeights:
    """Reduced weights from W_V (H_kv, d_h, k) and W_O (H_kv, g, k, d_h), the value bias folded into the output bias."""
    return ValueOutputWeights(
        W_V=W_V.to(weights.W_V.dtype),
        W_O=W_O.flatten(0, 1).to(weights.W_O.dtype),
        b_V=None,
        b_O=fold_value_bias(weights),
    )


def keep_value_output(weights: ValueOutputWeights, kept: Tensor, *, W_O: Tensor | None = None) -> ValueOutputWeights:
    """Keep the dims ``kept`` (H_kv, k) of each value head.

    W_O (H_kv, g, k, d_h), where given, replaces the slice of the old one.
    """
    W_V = take_columns(weights.W_V, kept)
    if W_O is None:
        W_O = take_rows(group_heads(weights.W_O, len(weights.W_V)), kept)
    return build_value_output(weights, W_V, W_O)


def take_columns(W: Tensor, kept: Tensor) -> Tensor:
    """(H, m, d) to (H, m, k), the columns ``kept`` (H, k) of each head."""
    return W.gather(2, kept.unsqueeze(1).expand(-1, W.shape[1], -1))


def take_rows(W_O: Tensor, kept: Tensor) -> Tensor:
    """(H_kv, g, d, d_h) to (H_kv, g, k, d_h), the rows ``kept`` (H_kv, k) of each group."""
    return W_O.gather(2, kept[:, None, :, None].expand(-1, W_O.shape[1], -1, W_O.shape[3]))


def value_output_relative_error(G: Tensor, W_O: Tensor, approximation: Tensor) -> float:
    """``sum_h ||v W_O,h - v W'_h||^2 / sum_h ||v W_O,h||^2`` over tokens v with the Gram G (H_kv, 1 or g, d, d).

    W_O (H_kv, g, d, d_h); approximation W' likewise: the reduced map from the dense value dims to the output.
    """
    return relative(energy(G, W_O - approximation), energy(G, W_O))
