"""The integer program over options: what brute force finds, the budget kept."""

import itertools

import pytest
import torch

from modegpt.allocation.choices import cheapest_choices


def brute_force(sizes: list[torch.Tensor], costs: list[torch.Tensor], budget: int) -> float:
    return min(
        sum(float(cost[option]) for cost, option in zip(costs, options, strict=True))
        for options in itertools.product(*(range(len(of)) for of in sizes))
        if sum(int(size[option]) for size, option in zip(sizes, options, strict=True)) <= budget
    )


@pytest.mark.parametrize("seed", range(30))
def test_it_costs_what_brute_force_finds(seed: int) -> None:
    """Costs that fall with size, convex or not, and costs that do not."""
    generator = torch.Generator().manual_seed(seed)
    sizes, costs = [], []
    for _ in range(5):
        count = int(torch.randint(2, 6, (1,), generator=generator))
        sizes.append(torch.randint(1, 30, (count,), generator=generator).sort().values)
        drawn = torch.rand(count, generator=generator, dtype=torch.float64)
        costs.append(drawn if seed % 3 == 0 else drawn.sort(descending=True).values)
    smallest, largest = (sum(int(pick(of)) for of in sizes) for pick in (torch.min, torch.max))
    for budget in {smallest, (2 * smallest + largest) // 3, (smallest + 2 * largest) // 3, largest, 10 * largest}:
        chosen = cheapest_choices(sizes, costs, budget)
        assert sum(int(size[option]) for size, option in zip(sizes, chosen, strict=True)) <= budget
        found = sum(float(cost[option]) for cost, option in zip(costs, chosen, strict=True))
        assert found == pytest.approx(brute_force(sizes, costs, budget), rel=1e-12)


def test_greedy_is_not_enough() -> None:
    """The steepest step leaves budget that nothing fits in; two flatter ones use it all."""
    sizes = [torch.tensor([0, 6]), torch.tensor([0, 5]), torch.tensor([0, 5])]
    costs = [torch.tensor([7.0, 0.0]), torch.tensor([5.0, 0.0]), torch.tensor([5.0, 0.0])]
    assert cheapest_choices(sizes, costs, 10) == [0, 1, 1]


def test_as_many_items_as_a_large_model_has() -> None:
    """112 matrices with 100 ranks each: a bound of the dual says that no choice could cost noticeably less."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, 101)
    sizes = [ranks * (2048 if item % 7 < 4 else 3776) for item in range(112)]
    scale = torch.rand(112, generator=generator, dtype=torch.float64) + 0.1
    costs = [float(of) * torch.exp(-ranks / (20 + 40 * float(of))) for of in scale]
    budget = sum(int(of.max()) for of in sizes) // 2
    chosen = cheapest_choices(sizes, costs, budget)
    assert sum(int(size[option]) for size, option in zip(sizes, chosen, strict=True)) <= budget
    found = sum(float(cost[option]) for cost, option in zip(costs, chosen, strict=True))
    lam = torch.logspace(-10, -3, 4000, dtype=torch.float64)
    bounds = sum((cost.unsqueeze(1) + lam * size.unsqueeze(1)).amin(0) for size, cost in zip(sizes, costs, strict=True))
    assert isinstance(bounds, torch.Tensor)
    assert found == pytest.approx(float((bounds - lam * budget).max()), rel=1e-3)
