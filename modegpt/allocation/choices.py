"""One option for each of many items, at the least summed cost under a budget: the integer program, solved exactly."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

BISECTIONS = 100
ROUNDING = 1e-9
"""Of the bounds, relative."""


def cheapest_choices(sizes: Sequence[Tensor], costs: Sequence[Tensor], budget: int) -> list[int]:
    """For each item the number of one option, so that the sizes add up to no more than ``budget`` and the costs to the
    least.

    The multiple-choice knapsack problem. Lagrange's dual at ``lam`` bounds from below what any choice costs,
    ``L = sum_i min_j (c_ij + lam s_ij) - lam budget``, and a choice's cost exceeds that by at least its reduced costs
    ``sum_i c_ij + lam s_ij - min``. Filling up what the dual's choice leaves of the budget bounds the optimum from
    above. Partial choices between the two bounds, none of which is both larger and dearer than another, are then
    extended item by item. Exact, up to the rounding of float64; the closer the bounds, the fewer of them there are.

    Args:
        sizes: int64 (num_options,) an item.
        costs: (num_options,) an item, as long.
        budget: not less than the smallest options together.
    """
    least = [int(of.min()) for of in sizes]
    assert sum(least) <= budget, (sum(least), budget)
    size_of = pad_sequence([of.cpu() for of in sizes], batch_first=True)
    cost_of = pad_sequence([of.cpu().double() for of in costs], batch_first=True, padding_value=torch.inf)
    lam, filled = _dual(size_of, cost_of, budget)
    priced = cost_of + lam * size_of.double()
    reduced = priced - priced.amin(dim=1, keepdim=True)
    bound = float(priced.amin(dim=1).sum()) - lam * budget
    upper = float(cost_of.gather(1, filled).sum())
    gap = upper - bound + ROUNDING * (abs(upper) + lam * budget)

    size, cost, excess = torch.zeros(1, dtype=torch.long), *torch.zeros(2, 1, dtype=torch.float64)
    steps: list[tuple[Tensor, Tensor]] = []
    room = budget - sum(least)
    for item, smallest in enumerate(least):
        room += smallest  # what the items so far may take together
        possible = (reduced[item] <= gap).nonzero().squeeze(1)
        parent, option = (each.flatten() for each in torch.meshgrid(torch.arange(len(size)), possible, indexing="ij"))
        new_size, new_cost = size[parent] + size_of[item, option], cost[parent] + cost_of[item, option]
        new_excess = excess[parent] + reduced[item, option]
        alive = ((new_size <= room) & (new_excess <= gap)).nonzero().squeeze(1)
        alive = alive[new_cost[alive].argsort(stable=True)]
        alive = alive[new_size[alive].argsort(stable=True)]
        cheapest_before = torch.cat([torch.tensor([torch.inf], dtype=torch.float64), new_cost[alive].cummin(0).values])
        alive = alive[new_cost[alive] < cheapest_before[:-1]]
        size, cost, excess = new_size[alive], new_cost[alive], new_excess[alive]
        steps.append((parent[alive], option[alive]))
    chosen, at = [], int(cost.argmin())
    for parent, option in reversed(steps):
        chosen.append(int(option[at]))
        at = int(parent[at])
    return chosen[::-1]


def _dual(sizes: Tensor, costs: Tensor, budget: int) -> tuple[float, Tensor]:
    """The multiplier at which the dual's choice just meets the budget, and that choice with what is left filled up.

    ``sizes`` and ``costs`` (num_items, num_options), infinite costs where there is no option; a choice (num_items, 1).
    """

    def choice(lam: float) -> Tensor:
        return (costs + lam * sizes.double()).argmin(dim=1, keepdim=True)

    def total(options: Tensor) -> int:
        return int(sizes.gather(1, options).sum())

    low, high = 0.0, 1e-12
    while total(choice(high)) > budget:
        high *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(choice(middle)) > budget else (low, middle)
    filled = choice(high)
    while True:
        room = budget - total(filled) + sizes.gather(1, filled)
        saved = torch.where(sizes <= room, costs.gather(1, filled) - costs, -torch.inf)
        best = int(saved.argmax())
        if saved.flatten()[best] <= 0:
            return high, filled
        filled[best // sizes.shape[1]] = best % sizes.shape[1]
