"""The exchange of a budget: exact, optimal where brute force can say so, and bound by caps."""

from itertools import product

import pytest

from modegpt.allocation.exchange import allowed_ranks, exchange, hull, most_removed
from modegpt.allocation.ranks import ModuleBudget, RankPlan, integer_ranks, removed_parameters

MLP, QK = (
    ModuleBudget(size=8, unit=1, parameters_per_dimension=3),
    ModuleBudget(size=6, unit=2, parameters_per_dimension=4),
)
LAYERS = [{"mlp": MLP, "query_key": QK}] * 2


def quadratic(weight: float, size: int) -> list[float]:
    return [weight * k**2 for k in range(size + 1)]


COSTS = [
    {"mlp": quadratic(1.0, 8), "query_key": quadratic(9.0, 6)},
    {"mlp": quadratic(3.0, 8), "query_key": quadratic(0.5, 6)},
]


def total_cost(ranks: list[dict[str, int]]) -> float:
    return sum(COSTS[i][name][layer[name].size - ranks[i][name]] for i, layer in enumerate(LAYERS) for name in layer)


@pytest.mark.parametrize("sparsity", [0.0, 0.13, 0.25, 0.4, 0.6])
def test_budget_is_exact_and_cost_near_the_best(sparsity: float) -> None:
    start = integer_ranks([sparsity] * 2, LAYERS)
    plan = exchange(COSTS, LAYERS, start, cap=0.9)
    total = sum(module.parameters for layer in LAYERS for module in layer.values())
    assert abs(plan.achieved - start.target) * total <= MLP.step / 2 + 1e-9
    removed = sum(removed_parameters(kept, layer) for kept, layer in zip(plan.ranks, LAYERS, strict=True))
    assert plan.achieved == pytest.approx(removed / total)
    choices = [allowed_ranks(layer[name], 0.9) for layer in LAYERS for name in layer]
    reachable = (
        total_cost([{"mlp": a, "query_key": b}, {"mlp": c, "query_key": d}])
        for a, b, c, d in product(*choices)
        if 3 * (16 - a - c) + 4 * (12 - b - d) >= removed
    )
    # single units cannot split the last step of the hull; the quadratic's cost of one unit bounds the difference
    assert total_cost(plan.ranks) <= min(reachable) + 25
    assert total_cost(plan.ranks) <= total_cost(start.ranks) + 1e-9


@pytest.mark.parametrize("cap", [0.3, 0.5])
def test_the_most_that_can_be_removed_is_known(cap: float) -> None:
    layers = [*LAYERS, {"mlp": ModuleBudget(8, 1, 3, frozen=True), "query_key": ModuleBudget(6, 2, 4, sparsity=0.4)}]
    start = integer_ranks([0.6] * 3, layers)
    most = most_removed(layers, start, cap=cap)
    assert exchange([*COSTS, {}], layers, start, cap=cap).achieved == most < start.target


def test_frozen_and_overridden_modules_keep_their_ranks() -> None:
    layers = [
        {"mlp": MLP, "query_key": ModuleBudget(6, 2, 4, frozen=True)},
        {"mlp": ModuleBudget(8, 1, 3, sparsity=0.5), "query_key": QK},
    ]
    start = integer_ranks([0.3, 0.3], layers)
    plan = exchange(COSTS, layers, start, cap=0.9)
    assert plan.ranks[0]["query_key"] == 6 and plan.ranks[1]["mlp"] == 4
    assert exchange([{}, {}], layers, start, cap=0.9) is start


def test_no_module_loses_more_than_the_cap() -> None:
    costs = [
        {"mlp": [0.0] * 9, "query_key": quadratic(1e6, 6)},
        {"mlp": quadratic(1e6, 8), "query_key": quadratic(1e6, 6)},
    ]
    plan = exchange(costs, LAYERS, integer_ranks([0.3] * 2, LAYERS), cap=0.5)
    assert plan.ranks[0]["mlp"] == 4
    assert allowed_ranks(QK, 0.5) == [6, 4] and allowed_ranks(MLP, 0.9)[-1] == 1


def test_hull_skips_what_lies_above() -> None:
    assert hull([(0, 0), (1, 5), (2, 1), (3, 2), (4, 10)]) == [0, 2, 3, 4]


def test_a_hull_drops_every_corner_that_a_later_point_lies_below() -> None:
    assert hull([(0, 0), (1, 1), (2, 3), (3, 7), (4, 2)]) == [0, 4]


def test_what_lies_behind_a_corner_waits_for_its_own_slope() -> None:
    """Two dims of the first module are free and the next ones dear; the rest comes from the second, an even slope."""
    layers = [{"mlp": MLP}, {"mlp": MLP}]
    costs = [{"mlp": [0.0, 0.0, 0.0, *(100.0 * k for k in range(1, 7))]}, {"mlp": [1.0 * k for k in range(9)]}]
    for gone, ranks in ((2, [6, 8]), (3, [6, 7]), (4, [6, 6]), (9, [6, 1])):
        start = RankPlan(ranks=[{"mlp": 8}, {"mlp": 8}], target=gone / 16, achieved=0.0)
        assert [of_layer["mlp"] for of_layer in exchange(costs, layers, start, cap=0.9).ranks] == ranks


def test_a_dear_first_dim_pays_where_those_behind_it_are_free() -> None:
    """Four dims of the first module cost less than four of the second, though the first of them alone costs more."""
    layers = [{"mlp": MLP}, {"mlp": MLP}]
    costs = [{"mlp": [0.0, *[5.0] * 8]}, {"mlp": [2.0 * k for k in range(9)]}]
    start = RankPlan(ranks=[{"mlp": 8}, {"mlp": 8}], target=4 / 16, achieved=0.0)
    assert [of_layer["mlp"] for of_layer in exchange(costs, layers, start, cap=0.9).ranks] == [4, 8]


@pytest.mark.parametrize("costs", [(1.0, 4.0), (4.0, 1.0)])
def test_what_no_step_meets_is_closed_where_that_is_cheapest(costs: tuple[float, float]) -> None:
    """The small module is at its cap, and a step of either large one overshoots what is left: the cheaper one goes."""
    small, large = (ModuleBudget(size, 1, parameters) for size, parameters in ((2, 1), (8, 12)))
    layers = [{"mlp": small}, {"mlp": large}, {"mlp": large}]
    start = RankPlan(ranks=[{"mlp": 2}, {"mlp": 8}, {"mlp": 8}], target=11 / 194, achieved=0.0)
    curves = [{"mlp": [0.0] * 3}, *({"mlp": quadratic(cost, 8)} for cost in costs)]
    plan = exchange(curves, layers, start, cap=0.5)
    cheap = 1 + costs.index(min(costs))
    assert [plan.ranks[cheap]["mlp"], plan.ranks[3 - cheap]["mlp"]] == [7, 8]
