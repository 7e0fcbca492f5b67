"""Splitting one parameter budget over modules and layers by what each rank costs."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from modegpt.allocation.ranks import ModuleBudget, RankPlan, is_free, removed_parameters


def allowed_ranks(module: ModuleBudget, cap: float) -> list[int]:
    """The ranks a module may have, descending from its full size, none removing more than the share ``cap``."""
    ranks: list[int] = []
    rank: int | None = module.size
    while rank is not None and module.size - rank <= cap * module.size:
        ranks.append(rank)
        rank = module.move(rank, -1)
    return ranks


def most_removed(layers: Sequence[Mapping[str, ModuleBudget]], start: RankPlan, *, cap: float) -> float:
    """Share of all parameters that ``exchange`` can remove at most: free modules at their least allowed rank, the
    others at those of ``start``.
    """
    removed = sum(
        module.removed(allowed_ranks(module, cap)[-1] if is_free(module) else kept[name])
        for kept, layer in zip(start.ranks, layers, strict=True)
        for name, module in layer.items()
    )
    return removed / sum(module.parameters for layer in layers for module in layer.values())


def hull(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the lower convex hull of points (x, y) with increasing x."""
    kept: list[int] = []
    for index, (x, y) in enumerate(points):
        while len(kept) >= 2:
            (x_0, y_0), (x_1, y_1) = points[kept[-2]], points[kept[-1]]
            if (y_1 - y_0) * (x - x_0) < (y - y_0) * (x_1 - x_0):
                break
            kept.pop()
        kept.append(index)
    return kept


def exchange(
    costs: Sequence[Mapping[str, Sequence[float]]],
    layers: Sequence[Mapping[str, ModuleBudget]],
    start: RankPlan,
    *,
    cap: float,
) -> RankPlan:
    """Ranks that remove as much as ``start`` aims at for the least summed cost.

    ``costs[layer][module][k]``: cost of removing k of the module's dims (k = 0 ... size), of free modules; those that
    are not free, and layers without costs, keep the ranks of ``start``. Steps are taken where the convex hull of cost
    over parameters is flattest, which is the optimum of the Lagrangian; then single units move, the cheapest a
    parameter first, until the total is within half the smallest step of the target. No module loses more than the
    share ``cap``.
    """
    ranks = [dict(of_layer) for of_layer in start.ranks]
    free = {
        (index, name): layers[index][name]
        for index, of_layer in enumerate(costs)
        for name in of_layer
        if is_free(layers[index][name])
    }
    if not free:
        return start
    total = sum(module.parameters for layer in layers for module in layer.values())
    for index, name in free:
        ranks[index][name] = layers[index][name].size
    budget = start.target * total - sum(
        removed_parameters(kept, layer) for kept, layer in zip(ranks, layers, strict=True)
    )
    smallest = min(module.step for module in free.values())

    segments = []
    for (index, name), module in free.items():
        allowed = allowed_ranks(module, cap)
        points = [(module.removed(rank), costs[index][name][module.size - rank]) for rank in allowed]
        corners = hull(points)
        for one, two in pairwise(corners):
            slope = (points[two][1] - points[one][1]) / (points[two][0] - points[one][0])
            segments.append((slope, index, name, allowed[one : two + 1]))
    segments.sort(key=lambda segment: segment[0])
    closed = set()
    for _, index, name, path in segments:
        if (index, name) in closed:
            continue
        for rank in path[1:]:
            change = layers[index][name].removed(rank) - layers[index][name].removed(ranks[index][name])
            if change > budget + smallest / 2:
                closed.add((index, name))
                break
            ranks[index][name] = rank
            budget -= change
    _settle(ranks, budget, free, costs, cap=cap, tolerance=smallest / 2)
    achieved = sum(removed_parameters(kept, layer) for kept, layer in zip(ranks, layers, strict=True)) / total
    return RankPlan(ranks=ranks, target=start.target, achieved=achieved)


def _settle(
    ranks: list[dict[str, int]],
    budget: float,
    free: Mapping[tuple[int, str], ModuleBudget],
    costs: Sequence[Mapping[str, Sequence[float]]],
    *,
    cap: float,
    tolerance: float,
) -> None:
    """Move single units, in place, while that brings the parameters still to remove (``budget``) nearer to zero."""
    while abs(budget) > tolerance:
        best = None
        for (index, name), module in free.items():
            rank = ranks[index][name]
            moved = module.move(rank, -1 if budget > 0 else 1)
            if moved is None or module.size - moved > cap * module.size:
                continue
            change = module.removed(moved) - module.removed(rank)
            if abs(budget - change) >= abs(budget):
                continue
            cost = costs[index][name]
            price = (cost[module.size - moved] - cost[module.size - rank]) / abs(change)
            if best is None or price < best[0]:
                best = (price, index, name, moved, change)
        if best is None:
            return
        _, index, name, moved, change = best
        ranks[index][name] = moved
        budget -= change
