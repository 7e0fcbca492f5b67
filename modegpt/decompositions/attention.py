"""Choosing the query-key dims that stay by what the attention's output loses, to first order in the logits.

States enter as they meet in the product: after bias, norm, rotation and softmax scale. Dims come in blocks: a rotated
pair ``(i, j) = (i, i + d/2)`` under RoPE, one dim otherwise. A block's share of the logit is ``q_i k_i + q_j k_j``.
"""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor


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
    """M (H, b, b): inner products, summed over queries, of the output changes that the blocks cause to first order.

    Adding ``e_s`` to the logits of a query changes its output by ``sum_s p_s e_s (v_s - v_mean)``: a shift common to
    all keys does nothing. For a block this is its query coordinates times the covariance of k and v under p. Removing
    the blocks R costs ``1_R^T M 1_R``. b = d/2 (pairs), else d. 2 t s d m FLOPs a head and window.
    """
    k = states.keys()
    p = (states.q @ k.mT + states.bias).softmax(dim=-1)
    v_mean, k_mean = p @ states.v, p @ k
    num_blocks = k.shape[-1] // 2 if pairs else k.shape[-1]
    M = p.new_zeros(p.shape[1], num_blocks, num_blocks, dtype=torch.float64)
    # one at a time, so that what is made of it stays in a processor's cache
    for window, head in itertools.product(*map(range, p.shape[:2])):
        N = (p[window, head].unsqueeze(1) * k[window, head].mT) @ states.v[window, head]
        N -= k_mean[window, head].unsqueeze(-1) * v_mean[window, head].unsqueeze(-2)
        D = states.q[window, head].unsqueeze(-1) * N
        D = torch.add(*D.chunk(2, dim=1)) if pairs else D
        D = D.transpose(0, 1).flatten(1).double()
        M[head].addmm_(D, D.mT)
    return M


def elimination_order(R: Tensor, num_removed: int) -> tuple[Tensor, Tensor]:
    """Greedy order (..., num_removed) in which blocks go, and ``1_S^T R_SS 1_S`` after each removal, S what is gone.

    R (..., b, b): Gram of what each block adds, of any number of heads, which take their steps together.
    """
    alive = torch.ones(R.shape[:-1], dtype=torch.bool, device=R.device)
    order, lost = (R.new_zeros(*R.shape[:-2], num_removed, dtype=dtype) for dtype in (torch.long, R.dtype))
    costs = R.diagonal(dim1=-2, dim2=-1).clone()
    for step in range(num_removed):
        least, chosen = torch.where(alive, costs, torch.inf).min(dim=-1, keepdim=True)
        order[..., step], lost[..., step] = chosen.squeeze(-1), least.squeeze(-1)
        alive.scatter_(-1, chosen, False)
        costs += 2 * R.take_along_dim(chosen.unsqueeze(-1), dim=-2).squeeze(-2)
    return order, lost.cumsum(-1)
