"""Output-aware backward elimination: remove, one at a time, the channel whose loss costs the refitted output least."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import wrap_torch_function

from modegpt.decompositions.linalg import equilibrate, psd_cholesky
from modegpt.decompositions.modules import (
    MLPVariant,
    MLPWeights,
    Reduction,
    Sizes,
    Statistics,
    ValueOutputVariant,
    ValueOutputWeights,
    check_positive,
)
from modegpt.decompositions.nystrom import reduce_to_channels, refit
from modegpt.decompositions.selection import group_heads, keep_value_output, value_output_relative_error


@torch.no_grad()
def eliminate(C: Tensor, W: Tensor, rank: int, *, ridge: float, block: int) -> tuple[Tensor, Tensor]:
    """Greedy backward elimination of ``n - rank`` channels: what is removed, in order, and the cost of each removal.

    Both are (n - rank,). C (n, n) Gram of the channels, W (n, m) output matrix. With S the channels still kept,
    ``P = (C_SS)^-1`` and ``B = P C_S: W`` the refitted output matrix, removing j raises the squared error
    ``min_B ||h W - h_S B||^2`` by exactly ``||B_j||^2 / P_jj``; only P and ``E = B B^T`` are needed, and both change by
    a rank-one and a rank-two term a removal. Those are applied in panels of ``block`` removals, so that the work is in
    matrix products, and what is gone leaves P and E; the result does not depend on ``block``. ``ridge`` is added to the
    unit diagonal of the equilibrated C for the scores alone; it bounds P, whose downdates would otherwise lose what a
    singular C has. About n^3 + 2 n^2 m + 2 (n^3 - rank^3) FLOPs, float64.
    """
    K, scale, _ = equilibrate(C)
    del C  # which may be nobody else's
    K.diagonal().add_(ridge)
    P = psd_cholesky(K).inverse()
    del K
    scaled = scale.unsqueeze(1) * W.double()
    PE = P.new_empty(2, *P.shape)
    PE[0] = P
    del P
    torch.matmul(scaled, scaled.mT, out=PE[1])
    del scaled

    num_removed = PE.shape[1] - rank
    removed, costs = torch.empty(num_removed, dtype=torch.long, device=PE.device), PE.new_empty(num_removed)
    channels = torch.arange(PE.shape[1], device=PE.device)
    for start in range(0, num_removed, block):
        width = min(block, num_removed - start)
        steps, costs[start : start + width], alive, pw = _panel(PE, width)
        removed[start : start + width] = channels[steps]
        PE, pw, channels = _alive_first(alive, PE, pw, channels)
        p, w = pw
        PE[0].addmm_(p.mT, p, alpha=-1)
        PE[1].addmm_(pw.flatten(0, 1).mT, torch.cat((w, p)), alpha=-1)
    return removed, costs


def _alive_first(alive: Tensor, PE: Tensor, *others: Tensor) -> list[Tensor]:
    """Views of PE (2, n, n) and others (..., n) that hold the channels ``alive`` (n,) alone, moved within them: the
    last take the places of those that are gone, so that little is copied.
    """
    size = int(alive.sum())
    gone, last = (~alive[:size]).nonzero().squeeze(1), size + alive[size:].nonzero().squeeze(1)
    PE[:, gone] = PE[:, last]
    for tensor in (PE, *others):
        tensor[..., gone] = tensor[..., last]
    return [PE[:, :size, :size], *(tensor[..., :size] for tensor in others)]


@wrap_torch_function(lambda PE, width: (PE,))  # one operation to those that watch: many small steps on vectors
def _panel(PE: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``width`` removals: their indices and costs, what is left (n,), and the updates of P and E that are pending.

    These are ``P - p^T p`` and ``E - p^T w - w^T p``: a row of p and one of w (2, width, n) a removal. The chosen index
    stays where it is computed, and a step is few operations: on a GPU waiting and launching would take most of the
    time.
    """
    n = PE.shape[1]
    alive = torch.ones(n, dtype=torch.bool, device=PE.device)
    steps, costs = torch.empty(width, dtype=torch.long, device=PE.device), PE.new_empty(width)
    diag_P, diag_E = PE.diagonal(dim1=1, dim2=2).clone()
    pw = PE.new_empty(2, width, n)
    for t in range(width):
        j, (p, w) = steps[t : t + 1], pw[:, t]
        cost = torch.where(alive, diag_E.clamp(min=0) / diag_P, torch.inf)
        torch.min(cost, dim=0, keepdim=True, out=(costs[t : t + 1], j))
        columns, pending = PE[:, j].squeeze(1), pw[:, :t].index_select(2, j).squeeze(2)
        columns.addmm_(pending, pw[0, :t], alpha=-1)
        columns[1].addmv_(pw[1, :t].mT, pending[0], alpha=-1)
        pivot, cross = columns.index_select(1, j)
        scale = pivot.rsqrt()
        torch.mul(columns[0], scale, out=p)
        torch.mul(torch.addcmul(columns[1], p, cross * scale, value=-0.5), scale, out=w)
        diag_P.addcmul_(p, p, value=-1)
        diag_E.addcmul_(p, w, value=-2)
        alive.index_fill_(0, j, False)
    return steps, costs, alive, pw


def surviving(removed: Tensor, num_channels: int) -> Tensor:
    """Ascending indices (..., k) of the channels not in ``removed`` (..., num_channels - k)."""
    alive = torch.ones(*removed.shape[:-1], num_channels, dtype=torch.bool, device=removed.device)
    return alive.scatter_(-1, removed, False).nonzero()[:, -1].view(*removed.shape[:-1], -1)


@dataclass(frozen=True)
class MLPElimination(MLPVariant):
    """Backward elimination of MLP channels weighted by W_D, then the refit of MLPNystrom.

    Each step removes the channel that raises ``min_W' ||h W_D - h_S W'||^2`` least. Optimum: the exact greedy choice at
    each step (up to ``ridge``) and the least-squares optimum for the final set; the best set is NP-hard.
    relative_error: as MLPNystrom.
    Cost: n^3 + 2 n^2 d_h + 2 (n^3 - k^3) FLOPs, then that of the refit. ``block``: panel width, speed alone.
    Source: optimal brain surgeon step (Hassibi & Stork, 1993) on columns, with delayed updates as in blocked pivoted
    Cholesky.
    """

    label: ClassVar[str] = "Greedy elimination"
    required: ClassVar[frozenset[str]] = frozenset({"mlp.C"})
    ridge: float = 1e-6
    block: int = 128

    def __post_init__(self) -> None:
        check_positive(self, "ridge", zero_allowed=True)
        check_positive(self, "block")

    def reduce(
        self, weights: MLPWeights[Tensor], statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[MLPWeights[Tensor]]:
        """Eliminate down to ``rank``, refit W_D."""
        removed, _ = eliminate(statistics["mlp.C"], weights.W_D, rank, ridge=self.ridge, block=self.block)
        return reduce_to_channels(weights, statistics["mlp.C"], surviving(removed, weights.inner_size))

    def solver_elements(self, sizes: Sizes, rank: int) -> int:
        """What P is made of, its factor among it; later P and E, and what the refit solves."""
        return 4 * sizes.n**2 + 2 * sizes.n * sizes.d_h


@dataclass(frozen=True)
class ValueOutputColumns(ValueOutputVariant):
    """Keep columns of W_V and refit the group's output blocks: ``W_O <- (G_SS)^+ G_S: W_O``.

    The columns come from backward elimination weighted by the output blocks of the group. Optimum: least squares
    for the chosen columns, the exact greedy choice (up to ``ridge``) of columns; never better than ValueOutputSVD.
    relative_error: on the target of ValueOutputSVD. Cost: H_kv times that of MLPElimination at n = d, m = g d_h.
    Source: column selection, the alternative to Type III that MoDeGPT (arXiv 2408.09632) sets aside.
    """

    label: ClassVar[str] = "Columns"
    required: ClassVar[frozenset[str]] = frozenset({"value_output.G"})
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        check_positive(self, "ridge", zero_allowed=True)

    def reduce(
        self, weights: ValueOutputWeights, statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[ValueOutputWeights]:
        """Eliminate and refit in each value head."""
        G, d = statistics["value_output.G"].double(), weights.inner_size
        W_O = group_heads(weights.W_O.double(), len(weights.W_V))
        group_size, d_h = W_O.shape[1], W_O.shape[3]
        flat = W_O.transpose(1, 2).reshape(len(G), d, group_size * d_h)
        chosen: list[Tensor] = []
        blocks: list[Tensor] = []
        numerics: dict[str, Any] = {}
        for head, (G_head, W) in enumerate(zip(G, flat, strict=True)):
            removed, _ = eliminate(G_head, W, rank, ridge=self.ridge, block=d)
            chosen.append(surviving(removed, d))
            solved, report = refit(G_head, W, chosen[-1])
            blocks.append(solved.reshape(rank, group_size, d_h).transpose(0, 1))
            if report:
                numerics[f"head_{head}"] = report
        kept, B = torch.stack(chosen), torch.stack(blocks)
        lifted = torch.zeros_like(W_O).scatter(2, kept[:, None, :, None].expand_as(B), B)
        error = value_output_relative_error(G.unsqueeze(1), W_O, lifted)
        return Reduction(keep_value_output(weights, kept, W_O=B), relative_error=error, kept=kept, numerics=numerics)
