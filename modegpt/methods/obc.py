"""Structured optimal brain compression: remove what the output misses least while all that is left makes up for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from modegpt.calibration.statistics import Statistics
from modegpt.decompositions import experts
from modegpt.decompositions.elimination import eliminate
from modegpt.decompositions.linalg import psd_cholesky
from modegpt.decompositions.nystrom import refit
from modegpt.errors import UserError
from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.methods.structures import Kept, LayerWeights, StructureSizes, cheapest_within, pruned_model, removal_budget
from modegpt.models import Family, decoder_layers, dense_shape

OUTPUT_STATISTICS = frozenset({"value_output.C_o"})
BLOCK = 128
"""Channels that ``eliminate`` takes in one panel: speed alone."""
TINY = torch.finfo(torch.float64).tiny


def statistics_read(family: Family) -> frozenset[str]:
    """What ``hessians`` are made of."""
    return OUTPUT_STATISTICS | ({"mlp.C"} if family.experts_path is None else experts.REQUIRED)


def damped(C: Tensor, damping: float) -> Tensor:
    """The Hessian ``C + damping mean(diag C) I`` of a linear map's squared error, C (n, n) the Gram of its input."""
    H = C.double().clone()
    H.diagonal().add_(damping * H.diagonal().mean())
    return H


def hessians(weights: LayerWeights, statistics: Statistics, damping: float) -> tuple[Tensor, list[Tensor]]:
    """``damped`` of the output projection, and of the down projection of the MLP or of each expert."""
    of_mlps = [damped(C, damping) for _, C in experts.of_each(weights.mlp, statistics)]
    return damped(statistics["value_output.C_o"], damping), of_mlps


def eliminate_blocks(H: Tensor, W: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Greedy backward elimination of all blocks of consecutive rows: the order in which they go, and what each costs.

    With ``P = (H_AA)^-1`` of the rows A that are left and B their refitted weights, the removal of block S raises
    ``min_B tr((W - B)^T H (W - B))`` by ``tr(B_S^T (P_SS)^-1 B_S)`` (equation 2); ``B -= P_:S (P_SS)^-1 B_S`` and
    ``P -= P_:S (P_SS)^-1 P_S:`` (equation 3) keep B the least-squares optimum. H (n, n), W (n, m); float64, some
    2 n^3 + 2 n^2 m FLOPs.

    Returns:
        (num_blocks,) indices, and (num_blocks,) costs, which add up to ``tr(W^T H W)``.
    """
    blocks = torch.arange(len(W), device=W.device).view(num_blocks, -1)
    P, B = psd_cholesky(H).inverse(), W.double().clone()
    alive = torch.ones(num_blocks, dtype=torch.bool, device=W.device)
    order, costs = [], []
    for _ in range(num_blocks):
        B_S, P_SS = B[blocks], P[blocks.unsqueeze(2), blocks.unsqueeze(1)]
        P_SS[~alive] = torch.eye(blocks.shape[1], dtype=P.dtype, device=P.device)
        cost = (B_S * torch.linalg.solve(P_SS, B_S)).sum(dim=(1, 2))
        j = torch.where(alive, cost, torch.inf).argmin()
        S = blocks[j]
        columns = torch.linalg.solve(P_SS[j], P[S]).mT
        B -= columns @ B_S[j]
        P -= columns @ P[S]
        B[S] = 0.0
        P[S], P[:, S] = 0.0, 0.0
        alive[j] = False
        order.append(j)
        costs.append(cost[j])
    return torch.stack(order), torch.stack(costs)


def rising(costs: Tensor) -> Tensor:
    """The slopes (k,) of the lower convex hull of ``costs``' running sum: neighbours that fall share their mean."""
    pools: list[tuple[float, int]] = []
    for cost in costs.tolist():
        total, count = cost, 1
        while pools and pools[-1][0] * count >= total * pools[-1][1]:
            total, count = total + pools[-1][0], count + pools[-1][1]
            pools.pop()
        pools.append((total, count))
    return torch.tensor([total / count for total, count in pools for _ in range(count)], dtype=torch.float64)


@dataclass(frozen=True)
class StructuredOBC(Method):
    """Structured optimal brain compression (ZipLM; Kurtic, Frantar & Alistarh, NeurIPS 2023, arXiv 2302.04089).

    As O-FANG (AAAI 2026) sets it beside its own: one shot and without a gradient. In each layer the key/value groups
    that the output projection reads and the channels that the down projection reads are removed one at a time, each
    time the one whose loss costs the layer's output least (optimal brain surgeon), while what is left makes up for
    it: the update is the exact least-squares optimum for what stays. Costs are shares of the output's energy, and
    steps of all layers are taken in the order of their cost per weight until the budget is met, along the convex hull
    of each population's costs.

    Differs from the papers: ZipLM measures levels in runtime and searches a factor for each layer with the calibration
    loss (SPDY), here the budget is weights and every factor 1; all layers see the dense model's inputs. A second pass
    over the calibration tokens spares keeping every layer's Gram matrices. The experts of a layer lose as many channels
    each, one at a time for all of them together.

    Args:
        damping: added to the diagonal of the input's Gram matrix, relative to its mean.
    """

    name: ClassVar[str] = "obc"
    experts: ClassVar[bool] = True

    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.damping <= 0:
            raise UserError(f"method.damping={self.damping} must be positive: the Gram of few tokens is singular")

    def compress(self, task: CompressionTask) -> Compressed:
        """Order and cost every structure on one pass over the calibration tokens, remove the cheapest, refit."""
        shape = dense_shape(task.model.config)
        layers = decoder_layers(task.model)
        if task.sparsity == 0:
            return pruned_model(task, [Kept.everything(shape)] * len(layers))
        size = StructureSizes.of(task.family, layers[0], shape)
        sizes, budget, meter = [size.group, size.channel] * len(layers), removal_budget(task), task.calibration.meter
        orders: list[Tensor] = []
        costs: list[Tensor] = []
        read = statistics_read(task.family)
        for layer, statistics in zip(layers, task.calibration.statistics(read), strict=True):
            with meter.stage("solve", counted=True):
                of_layer = LayerWeights.read(task.family, layer)
                H_o, H = hessians(of_layer, statistics, self.damping)
                groups = eliminate_blocks(H_o, of_layer.value_output.W_O.flatten(0, 1), shape.num_kv_heads)
                of_mlps = [
                    eliminate(each_H, each.W_D, 0, ridge=0.0, block=BLOCK)
                    for each_H, each in zip(H, of_layer.mlps, strict=True)
                ]
                mlp_orders, mlp_costs = (torch.stack(each) for each in zip(*of_mlps, strict=True))
                channels = mlp_orders.squeeze(0), mlp_costs.sum(dim=0)
                for (order, cost), weight in ((groups, size.group), (channels, size.channel)):
                    orders.append(order.cpu())
                    costs.append(rising(cost / cost.sum().clamp(min=TINY)) / weight)
        gone = cheapest_within(costs, sizes, budget)
        stays = [
            ~of.expand_as(order).scatter(-1, order, of.expand_as(order)) for of, order in zip(gone, orders, strict=True)
        ]
        kept = [Kept(*of_layer) for of_layer in zip(stays[::2], stays[1::2], strict=True)]
        weights = []
        for layer, of_layer_kept, statistics in zip(layers, kept, task.calibration.statistics(read), strict=True):
            with meter.stage("solve", counted=True):
                of_layer = LayerWeights.read(task.family, layer)
                weights.append(refitted_layer(of_layer, of_layer_kept, *hessians(of_layer, statistics, self.damping)))
        return pruned_model(task, kept, weights)


def refitted_layer(weights: LayerWeights, kept: Kept, H_o: Tensor, H: Sequence[Tensor]) -> LayerWeights:
    """The layer with its output and down projection refitted for what is ``kept``, at dense size.

    H_o (H d, H d) and H, (n, n) of each MLP, are the Hessians of the two.
    """
    value_output = weights.value_output
    W_O = value_output.W_O.flatten(0, 1)
    W_O = refitted(H_o, W_O, kept.groups.repeat_interleave(len(W_O) // len(kept.groups)))
    mlps = zip(weights.mlps, H, kept.channels.expand(len(H), -1), strict=True)
    return replace(
        weights.with_mlps([replace(mlp, W_D=refitted(own, mlp.W_D, mask)) for mlp, own, mask in mlps]),
        value_output=replace(value_output, W_O=W_O.view_as(value_output.W_O)),
    )


def refitted(H: Tensor, W: Tensor, kept: Tensor) -> Tensor:
    """W (n, m) with the rows ``kept`` ((n,) bool) refitted for the loss of the others, in W's dtype."""
    if kept.all() or not kept.any():
        return W
    rows = kept.nonzero().squeeze(1).to(W.device)
    B, _ = refit(H, W, rows)
    return W.clone().index_copy_(0, rows, B.to(W.dtype))
