"""The norm of a head that lost dims: an estimate of the mean square of the whole head from what is left of it.

A head's norm divides by the root of ``n = sum_j c_j q_j^2 + eps``, over all its dims. After slicing only those of the
kept pairs S are there. The estimate is ``sum_S a_i e_i + b`` with the energies ``e_i`` of pairs (the sum of ``c q^2``
over their two dims), so the norm is one over the kept dims with a weight and an eps of its own. ``a`` and ``b``
minimise the *relative* error on the calibration states, ``sum_t (sum_S a_i u_ti + b v_t - 1)^2`` with ``u = e / n`` and
``v = 1 / n``: a plain least-squares fit would follow the few tokens of huge norm. The Gram N of ``[u_1 ... u_f, v]``
holds the whole problem for every S, since ``sum_i u_i + eps v = 1``.
"""

from typing import Any

import torch
from torch import Tensor

from modegpt.decompositions.linalg import psd_cholesky
from modegpt.decompositions.modules import HeadNorm, QueryKeyWeights, Statistics

PAIR_RIDGE = 1e-3


def fit_head_norm(norm: HeadNorm, N: Tensor, pairs: Tensor, fit: str) -> tuple[HeadNorm, Tensor]:
    """The norm of the kept ``pairs`` (H, k), of f, and the relative squared error of its estimate, one a norm.

    norm: the dense one. N (G, F + 1, F + 1), float64: the Gram of ``norm_shares``, where G norms span F pairs each
    (those of one head: F = f and G = H; of all heads: F = H f and G = 1).

    ``fit="kept"``: the mean square of the kept dims stands for that of all. ``"scale"``: one factor, fitted.
    ``"offset"``: a factor and an offset. ``"pairs"``: an offset and a factor for each pair, held to the one factor by a
    ridge and never negative. O(G F^2) FLOPs; ``pairs`` O(G (F k)^3 / f^3) a pass.
    """
    G, num_heads, k = len(N), len(pairs), pairs.shape[1]
    f, span = norm.w.shape[1] // 2, num_heads // G
    N, eps = N.double(), norm.eps.double()
    whole = torch.cat([torch.ones_like(N[:, :-1, 0]), eps.unsqueeze(1)], dim=1)
    towards = (N @ whole.unsqueeze(-1)).squeeze(-1)
    num_tokens = (whole * towards).sum(dim=1)
    places = pairs + f * (torch.arange(num_heads, device=pairs.device) % span).unsqueeze(1)
    index = torch.cat([places.reshape(G, -1), pairs.new_full((G, 1), f * span)], dim=1)
    N_S = N.gather(1, index.unsqueeze(-1).expand(-1, -1, N.shape[2]))
    N_S = N_S.gather(2, index.unsqueeze(1).expand(-1, index.shape[1], -1))
    towards_S = towards.gather(1, index)
    rows = _fit(N_S, towards_S, eps, fit, all_dims=f / k)
    factors = rows.squeeze(1)
    error = ((rows @ N_S.mT).squeeze(1) * factors).sum(dim=1) - 2 * (factors * towards_S).sum(dim=1)
    error = ((error + num_tokens) / num_tokens).clamp(min=0)
    a, b = factors[:, :-1].reshape(num_heads, k), factors[:, -1]
    dims = torch.cat([pairs, pairs + f], dim=1)
    w, c = (tensor.double().gather(1, dims) for tensor in (norm.w, norm.c))
    return HeadNorm(w=w, c=c * a.repeat(1, 2), eps=b), error


def share_factors(dense: HeadNorm, reduced: HeadNorm, pairs: Tensor) -> Tensor:
    """Factors (G, F + 1) of the shares of each norm whose sum is the estimate of ``reduced``, which kept ``pairs``."""
    factors = reduced.c.new_zeros(len(pairs), dense.w.shape[1] // 2)
    factors.scatter_(1, pairs, reduced.c[:, : pairs.shape[1]] / dense.c.double().gather(1, pairs))
    return torch.cat([factors.reshape(len(reduced.eps), -1), reduced.eps.unsqueeze(1)], dim=1)


def _fit(N: Tensor, towards: Tensor, eps: Tensor, fit: str, *, all_dims: float) -> Tensor:
    """Factors (G, 1, m + 1) of the m kept pairs and of the offset. N (G, m + 1, m + 1), ``towards`` (G, m + 1)."""
    m = N.shape[1] - 1

    def spread(scale: Tensor, offset: Tensor) -> Tensor:
        return torch.cat([scale.unsqueeze(1).expand(-1, m), offset.unsqueeze(1)], dim=1).unsqueeze(1)

    if fit == "kept":
        return spread(torch.full_like(eps, all_dims), eps)
    together = torch.zeros(m + 1, 2, dtype=N.dtype, device=N.device)
    together[:m, 0] = together[m, 1] = 1.0
    (A, y) = together.mT @ N @ together, towards @ together
    scale, offset = y[:, 0] / A[:, 0, 0], torch.zeros_like(eps)
    if fit != "scale":
        determinant = A[:, 0, 0] * A[:, 1, 1] - A[:, 0, 1] ** 2
        both = torch.stack(
            [y[:, 0] * A[:, 1, 1] - y[:, 1] * A[:, 0, 1], y[:, 1] * A[:, 0, 0] - y[:, 0] * A[:, 0, 1]], dim=1
        ) / determinant.unsqueeze(1)
        # where either is negative (or all norms are equal, so that they are one feature) the factor alone
        fine = torch.isfinite(both).all(dim=1) & (both > 0).all(dim=1)
        scale, offset = torch.where(fine, both[:, 0], scale), torch.where(fine, both[:, 1], offset)
    factors = spread(scale, offset)
    return factors if fit != "pairs" else torch.stack([_each(*each) for each in zip(N, towards, factors, strict=True)])


def _each(N: Tensor, towards: Tensor, one: Tensor) -> Tensor:
    """Factors (1, m + 1), none negative, of least relative error, held to those of ``one`` (1, m + 1) by a ridge."""
    start = one.squeeze(0)
    weight = PAIR_RIDGE * N.diagonal()
    alive = start > 0
    while True:
        index = alive.nonzero().squeeze(1)
        ridged = N[index][:, index] + torch.diag(weight[index])
        found = psd_cholesky(ridged).solve((towards + weight * start)[index].unsqueeze(1)).squeeze(1)
        if bool((found > 0).all()):
            return torch.zeros_like(start).index_copy(0, index, found).unsqueeze(0)
        alive[index[found <= 0]] = False


def keep_head_norms(
    weights: QueryKeyWeights, pairs: Tensor, statistics: Statistics, *, fit: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``norm_Q`` and ``norm_K`` (``HeadNorm``) for the kept ``pairs`` (H_kv, k), and their relative errors.

    Nothing where heads have no norms.
    """
    if weights.norm_Q is None or weights.norm_K is None:
        return {}, {}
    group = len(weights.W_Q) // len(weights.W_K)
    norm_Q, error_Q = fit_head_norm(
        weights.norm_Q, statistics["query_key.N_Q"], pairs.repeat_interleave(group, dim=0), fit
    )
    norm_K, error_K = fit_head_norm(weights.norm_K, statistics["query_key.N_K"], pairs, fit)
    errors = {"query": float(error_Q.mean()), "key": float(error_K.mean())}
    return {"norm_Q": norm_Q, "norm_K": norm_K}, {"norm_error": errors}


def norm_shares(states: Tensor, norm: HeadNorm) -> Tensor:
    """What the fits read of states (..., H, d) in front of their norm: (..., G, F + 1), the shares u and 1 / n."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    energies = norm.c.to(states.dtype) * states.square()
    first, second = energies.chunk(2, dim=-1)
    pairs = first + second
    pairs = pairs.reshape(*pairs.shape[:-2], len(norm.eps), -1)
    n = pairs.sum(dim=-1, keepdim=True) + norm.eps.to(states.dtype).unsqueeze(-1)
    return torch.cat([pairs / n, 1 / n], dim=-1)
