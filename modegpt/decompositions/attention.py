"""Choosing the query-key dims that stay by what the attention's output loses, to first order in the logits.

States enter as they meet in the product: after bias, norm, rotation and softmax scale. Dims come in blocks: a rotated
pair ``(i, i + d/2)`` under RoPE, one dim otherwise. A block's *real* feature is its share of the logit,
``c_i = q_i k_i + q_j k_j``; a pair also has a *quadrature* feature ``q_i k_j - q_j k_i``, the share it would have with
its queries turned by 90 degrees.
"""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modegpt.decompositions.linalg import psd_cholesky


@dataclass(frozen=True)
class AttentionStates:
    """Some queries of some windows and all they attend to.

    q (B, H, t, d), k (B, H_kv, s, d), v (B, H, s, m), bias (B or 1, 1, t, s). v are the value states of
    each query head in the metric of its output block (so that norms are those of the attention's output); bias is 0
    where a key may be attended to and -inf elsewhere. shares_Q (B, G_Q, t, F_Q), shares_K (B, G_K, s, F_K): what
    norms of heads, where there are any, are fitted on, see ``head_norm.norm_shares``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    shares_Q: Tensor | None = None
    shares_K: Tensor | None = None

    def keys(self) -> Tensor:
        """K repeated for the query heads, (B, H, s, d)."""
        return self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], dim=1)

    def output(self, T_Q: Tensor | None = None, T_K: Tensor | None = None) -> Tensor:
        """``softmax(q T_Q (k T_K)^T) v``, (B, H, t, m); T_Q (H, d, r), T_K (H_kv, d, r), None for the dense states."""
        q, k = self.q, self.keys()
        if T_Q is not None and T_K is not None:
            q, k = q @ T_Q, k @ T_K.repeat_interleave(len(T_Q) // len(T_K), dim=0)
        return (q @ k.mT + self.bias).softmax(dim=-1) @ self.v

    def estimated(self, factors_Q: Tensor, factors_K: Tensor) -> "AttentionStates":
        """The states with the norms of their heads estimated: factors (G_Q, F_Q) and (G_K, F_K) of shares."""
        assert self.shares_Q is not None and self.shares_K is not None, "these heads have no norms"
        q, k = (
            states * (shares @ factors.to(shares.dtype).unsqueeze(-1)).rsqrt().to(states.dtype)
            for states, shares, factors in (
                (self.q, self.shares_Q, factors_Q),
                (self.k, self.shares_K, factors_K),
            )
        )
        return replace(self, q=q, k=k)

    def mapped(self, T_Q: Tensor, T_K: Tensor) -> "AttentionStates":
        """The states in another basis of each head."""
        return replace(self, q=self.q @ T_Q, k=self.k @ T_K)


def output_sensitivity(states: AttentionStates, *, pairs: bool) -> Tensor:
    """M (H, F, F): inner products, summed over queries, of the output changes that the features cause to first order.

    Adding ``e_s`` to the logits of a query changes its output by ``sum_s p_s e_s (v_s - v_mean)``: a shift common to
    all keys does nothing. For a feature of block i this is its query coordinates times the covariance of k and v under
    p. Removing blocks R costs ``1_R^T M 1_R`` over their real features. F = d: the d/2 real, then the d/2 quadrature
    features (pairs), else the d dims. 2 t s d m FLOPs a head and window.
    """
    k = states.keys()
    p = (states.q @ k.mT + states.bias).softmax(dim=-1)
    v_mean, k_mean = p @ states.v, p @ k
    M = p.new_zeros(p.shape[1], k.shape[-1], k.shape[-1], dtype=torch.float64)
    # one at a time, so that what is made of it stays in a processor's cache
    for window, head in itertools.product(*map(range, p.shape[:2])):
        N = (p[window, head].unsqueeze(1) * k[window, head].mT) @ states.v[window, head]
        N -= k_mean[window, head].unsqueeze(-1) * v_mean[window, head].unsqueeze(-2)
        q = states.q[window, head].unsqueeze(-1)
        if pairs:
            (q_i, q_j), (N_i, N_j) = q.chunk(2, dim=1), N.chunk(2, dim=1)
            D = torch.cat([q_i * N_i + q_j * N_j, q_i * N_j - q_j * N_i], dim=1)
        else:
            D = q * N
        D = D.transpose(0, 1).flatten(1).double()
        M[head].addmm_(D, D.mT)
    return M


def elimination_order(R: Tensor, num_removed: int) -> tuple[Tensor, Tensor]:
    """Greedy order (num_removed,) in which features go, and ``1_S^T R_SS 1_S`` after each removal, S what is gone.

    R (b, b): Gram of what each feature adds.
    """
    alive = torch.ones(len(R), dtype=torch.bool, device=R.device)
    order, lost = [], R.new_zeros(num_removed)
    for step in range(num_removed):
        cost = torch.where(alive, R.diagonal() + 2 * R[:, ~alive].sum(dim=1), torch.inf)
        order.append(cost.argmin())
        alive[order[-1]] = False
        lost[step] = cost[order[-1]]
    return torch.stack(order) if order else alive.new_zeros(0, dtype=torch.long), lost.cumsum(0)


def eliminate_blocks(M: Tensor, num_kept: int, *, pairs: bool, ridge: float | None) -> tuple[Tensor, Tensor]:
    """Backward elimination of one key head's blocks; returns (kept blocks ascending (num_kept,), coefficients (g, F)).

    M (g, F, F) of the group's query heads. ``ridge=None``: what is removed costs ``1_R^T M_RR 1_R``, pair interactions
    included, and the kept features keep coefficient 1. Otherwise those of each query head are refitted at each step,
    ``min_a ||sum_f (a_f - t_f) D_f||^2 + ridge sum_S M_ff (a_f - t_f)^2`` with ``a_R = 0`` and t 1 (real) or 0
    (quadrature): a pair's queries are turned and scaled, which commutes with the rotation. The increase of the optimum
    with each removal is exact (block optimal brain surgeon). O(g F^3) FLOPs for the inverse and O(g F^2) a removal,
    float64.
    """
    g, F, _ = M.shape
    num_blocks = F // 2 if pairs else F
    real = torch.arange(num_blocks, device=M.device)
    blocks = torch.stack([real, real + num_blocks], dim=1) if pairs else real.unsqueeze(1)
    alive = torch.ones(num_blocks, dtype=torch.bool, device=M.device)
    if ridge is None:
        order, _ = elimination_order(M[:, :num_blocks, :num_blocks].sum(dim=0), num_blocks - num_kept)
        alive[order] = False
        return alive.nonzero().squeeze(1), (torch.arange(F, device=M.device) < num_blocks).to(M.dtype).expand(g, F)

    diagonal = M.diagonal(dim1=1, dim2=2)
    ridged = M + torch.diag_embed(ridge * diagonal)
    P = psd_cholesky(ridged).solve(torch.eye(F, dtype=M.dtype, device=M.device).repeat(g, 1, 1))
    a = torch.zeros(g, F, dtype=M.dtype, device=M.device)
    a[:, :num_blocks] = 1.0
    for _ in range(num_blocks - num_kept):
        P_BB = P[:, blocks[:, :, None], blocks[:, None, :]]
        a_B = a[:, blocks].unsqueeze(-1)
        # the ridge holds kept features only, so what it says of removed ones comes off again
        cost = (a_B * torch.linalg.solve(P_BB, a_B)).sum(dim=(0, 2, 3)) - ridge * diagonal[:, :num_blocks].sum(dim=0)
        j = torch.where(alive, cost, torch.inf).argmin()
        B = blocks[j]
        columns = P[:, :, B] @ torch.linalg.inv(P_BB[:, j])
        a = a - (columns @ a_B[:, j]).squeeze(-1)
        P = P - columns @ P[:, B]
        alive[j] = False
        # a removed feature stands apart from all others from now on
        P[:, B] = 0.0
        P[:, :, B] = 0.0
        P[:, B, B] = 1.0
        a[:, B] = 0.0
    return alive.nonzero().squeeze(1), a


def block_map(kept: Tensor, coefficients: Tensor, size: int, *, pairs: bool) -> tuple[Tensor, Tensor]:
    """T_Q (g, d, r), T_K (d, r) of one key head.

    They keep the blocks ``kept`` and scale the queries by ``coefficients`` (g, F).
    """
    num_blocks = size // 2 if pairs else size
    dims = torch.cat([kept, kept + num_blocks]) if pairs else kept
    T_K = torch.zeros(size, len(dims), dtype=coefficients.dtype, device=coefficients.device)
    T_K[dims, torch.arange(len(dims), device=kept.device)] = 1.0
    if not pairs:
        return coefficients.unsqueeze(-1) * T_K, T_K
    a, b = (
        coefficients[:, :num_blocks].repeat(1, 2).unsqueeze(-1),
        coefficients[:, num_blocks:].repeat(1, 2).unsqueeze(-1),
    )
    first, second = T_K.chunk(2, dim=0)
    turned = torch.cat([second, -first], dim=0)  # column j of a pair receives b q_i, column i receives -b q_j
    return a * T_K + b * turned, T_K
