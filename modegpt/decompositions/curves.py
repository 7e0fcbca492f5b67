"""What each rank of a module would cost, in closed form.

One pass over the spectrum or the elimination order gives every rank. Each function also returns the order behind its
curve, in which the dims of every lower rank are among those of a higher one.
"""

import torch
from torch import Tensor

from modegpt.decompositions.attention import elimination_order
from modegpt.decompositions.cr import cr_scores
from modegpt.decompositions.elimination import eliminate
from modegpt.decompositions.selection import group_heads, sum_pairs
from modegpt.decompositions.svd import product_svd


def mlp_curve(C: Tensor, W_D: Tensor, *, ridge: float = 1e-6, block: int = 128) -> tuple[Tensor, Tensor]:
    """Squared error (n + 1,) of the refitted output with 0 ... n channels removed, and the order (n,) in which they go.

    Float64. C (n, n) Gram of the channels, W_D (n, d_h). The error of the very set that ``MLPElimination`` keeps at
    that width. 3 n^3 FLOPs.
    """
    removed, costs = eliminate(C, W_D, 0, ridge=ridge, block=block)
    return torch.cat([costs.new_zeros(1), costs.clamp(min=0).cumsum(0)]), removed


def value_output_curve(G: Tensor, W_O: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared singular values (d + 1,) dropped with 0 ... d dims removed from every key/value head, and the factors.

    Float64. G (H_kv, d, d) pooled Gram of what the output blocks W_O (H, d, d_h) read. The factors are those of
    ``product_svd`` at full rank, P (H_kv, d, d) and B (H_kv, g, d, d_h): their first k columns and rows are the best at
    rank k.
    """
    P, B, squared, _ = product_svd(G, group_heads(W_O.double(), len(G)), G.shape[-1])
    dropped = squared.sum(dim=0).flip(0).cumsum(0)
    return torch.cat([dropped.new_zeros(1), dropped]), P, B


def query_key_curve(C_Q: Tensor, C_K: Tensor, *, rope: bool) -> tuple[Tensor, Tensor]:
    """Squared error (d + 1,) of the logits with 0 ... d dims removed from every key head; (d/2 + 1,) under RoPE.

    Float64. The dims of least CR score go first, as in ``QueryKeyCR``; pair interactions count. C_Q (H, d, d), C_K
    (H_kv, d, d). Also returns that order, (H_kv, d) or (H_kv, d/2).
    """
    scores = cr_scores(*(C.diagonal(dim1=-2, dim2=-1) for C in (C_Q, C_K)))
    product = group_heads(C_Q.double(), len(C_K)).sum(dim=1) * C_K.double()
    if rope:
        scores = sum_pairs(scores)
        a, b, c, d = (block for half in product.chunk(2, dim=-1) for block in half.chunk(2, dim=-2))
        product = a + b + c + d
    order = scores.argsort(dim=-1, stable=True)
    product = product.gather(1, order.unsqueeze(-1).expand_as(product)).gather(2, order.unsqueeze(1).expand_as(product))
    lost = product.cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2).sum(dim=0)
    return torch.cat([lost.new_zeros(1), lost.clamp(min=0)]), order


def attention_curve(M: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error (b + 1,) of the attention output, to first order, with 0 ... b blocks removed from every key head.

    Float64. M (H_kv, b, b) of ``SampledStates.sensitivity``; blocks are rotary pairs, or dims. They go by backward
    elimination in each head, in the order (H_kv, b) that is returned too.
    """
    orders, lost = elimination_order(M, M.shape[-1])
    total = lost.sum(dim=0).clamp(min=0).cummax(0).values
    return torch.cat([total.new_zeros(1), total]), orders
