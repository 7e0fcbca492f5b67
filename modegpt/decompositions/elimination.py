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
    E = scaled @ scaled.mT
    del scaled

    num_removed = len(P) - rank
    removed, costs = torch.empty(num_removed, dtype=torch.long, device=P.device), P.new_empty(num_removed)
    channels = torch.arange(len(P), device=P.device)
    for start in range(0, num_removed, block):
        width = min(block, num_removed - start)
        steps, costs[start : start + width], alive, p, uw = _panel(P, E, width)
        removed[start : start + width] = channels[steps]
        P, E, p, uw, channels = _alive_first(alive, P, E, p, uw, channels)
        P.addmm_(p.mT, p, alpha=-1)
        E.addmm_(uw.flatten(0, 1).mT, uw.flip(1).flatten(0, 1), alpha=-1)
    return removed, costs


def _alive_first(alive: Tensor, P: Tensor, E: Tensor, *others: Tensor) -> list[Tensor]:
    """Views of P, E (n, n) and others (..., n) that hold the channels ``alive`` (n,) alone, moved within them: the last
    take the places of those that are gone, so that little is copied.
    """
    size = int(alive.sum())
    gone, last = (~alive[:size]).nonzero().squeeze(1), size + alive[size:].nonzero().squeeze(1)
    for matrix in (P, E):
        matrix[gone] = matrix[last]
    for tensor in (P, E, *others):
        tensor[..., gone] = tensor[..., last]
    return [P[:size, :size], E[:size, :size], *(tensor[..., :size] for tensor in others)]


@wrap_torch_function(lambda P, E, width: (P, E))  # one operation to those that watch: many small steps on vectors
def _panel(P: Tensor, E: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``width`` removals: their indices and costs, what is left (n,), and the updates of P and E that are pending.

    These are ``P - p^T p`` and ``E - u^T w - w^T u``: a row of p (width, n) and one each of u and w (width, 2, n) a
    removal.
    """
    alive = torch.ones(len(P), dtype=torch.bool, device=P.device)
    steps, costs = torch.empty(width, dtype=torch.long, device=P.device), P.new_empty(width)
    diag_P, diag_E = P.diagonal().clone(), E.diagonal().clone()
    p, uw = P.new_empty(width, len(P)), P.new_empty(width, 2, len(P))
    for t in range(width):
        cost = torch.where(alive, diag_E.clamp(min=0) / diag_P, torch.inf)
        j = int(cost.argmin())
        column_P = torch.addmv(P[j], p[:t].mT, p[:t, j], alpha=-1)
        column_E = torch.addmv(E[j], uw[:t].flatten(0, 1).mT, uw[:t, :, j].flip(1).flatten(), alpha=-1)
        p[t] = column_P / column_P[j].sqrt()
        u = column_P / column_P[j]
        w = column_E - 0.5 * column_E[j] * u
        uw[t, 0], uw[t, 1] = u, w
        diag_P -= p[t] ** 2
        diag_E -= 2 * u * w
        alive[j] = False
        steps[t], costs[t] = j, cost[j]
    return steps, costs, alive, p, uw


def surviving(removed: Tensor, num_channels: int) -> Tensor:
    """Ascending indices of the channels not in ``removed``."""
    alive = torch.ones(num_channels, dtype=torch.bool, device=removed.device)
    alive[removed] = False
    return alive.nonzero().squeeze(1)


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
