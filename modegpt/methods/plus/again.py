"""Sharing the budget out again by what each module costs in the model as it is planned, and not in the dense one."""

from collections.abc import Callable, Mapping, Sequence

from modegpt.allocation.ranks import RankPlan
from modegpt.calibration.calibration import Calibration
from modegpt.methods.divergence import Reference, StandIns, acting_as
from modegpt.methods.plus.sensitivity import (
    Costs,
    compared_positions,
    curve_statistics,
    expected,
    measured_windows,
)
from modegpt.methods.prospects import PROSPECTS, Prospect
from modegpt.models import decoder_layers

FIRST_RADIUS = 0.16
"""Share of its dims by which a module may change in a round; half as much after a plan that was no better."""

DISTANCE = 0.1
"""Between the two shares of a module at which its divergence is measured, the planned one and a larger."""

MOST_REMOVED = 0.9

TOO_FAR = 1e3
"""Nats a dim beyond the radius."""

Prospects = Sequence[Mapping[str, Prospect]]


def planned_again(
    calibration: Calibration,
    modules: Mapping[str, frozenset[str]],
    plan: RankPlan,
    replan: Callable[[Costs], RankPlan],
    *,
    skip_layers: tuple[int, ...],
    rounds: int,
) -> RankPlan:
    """``plan``, or what ``rounds`` of measuring around it made better.

    Of each module the divergence is measured at about its planned rank and at a lower one, all other modules acting as
    planned, less that of the model where this module alone is whole: what it costs there. ``replan`` shares the budget
    out by these costs, within ``FIRST_RADIUS`` of the plan. The new plan is kept if the whole model diverges less with
    it, in closed form, on the last calibration windows, which nothing else here reads; if not, the radius is halved.

    Args:
        modules: with the statistics that they need.
    """
    model, ids = calibration.model, calibration.tokens.ids
    prospects: list[dict[str, Prospect]] = []
    for index, (layer, statistics) in enumerate(
        zip(decoder_layers(model), curve_statistics(calibration, modules), strict=True)
    ):
        wanted = () if index in skip_layers else modules
        prospects.append({module: PROSPECTS[module](calibration.family, layer, statistics) for module in wanted})
    measured = measured_windows(ids, num_layers=len(prospects))
    positions = compared_positions(measured, vocabulary=len(model.get_output_embeddings().weight))
    reference, judge = (
        Reference.of(model, windows, batch_size=calibration.batch_size, positions=positions)
        for windows in (measured, ids[-len(measured) :, : measured.shape[1]])
    )

    def judged(plan: RankPlan) -> float:
        with acting_as(stand_ins(prospects, plan)):
            return judge.divergence()

    least, radius, costs = judged(plan), FIRST_RADIUS, None
    for _ in range(rounds):
        costs = costs or marginal_costs(reference.restarted(), prospects, plan)
        other = replan(within(costs, prospects, plan, radius))
        if (divergence := judged(other)) < least:
            plan, least, costs = other, divergence, None
        else:
            radius /= 2
    return plan


def stand_ins(prospects: Prospects, plan: RankPlan, but: tuple[int, str] | None = None) -> StandIns:
    """Every module acting as ``plan`` has it, ``but`` one."""
    return [
        stand_in
        for index, of_layer in enumerate(prospects)
        for module, prospect in of_layer.items()
        if (index, module) != but
        for stand_in in prospect.at(plan.ranks[index][module])
    ]


def marginal_costs(reference: Reference, prospects: Prospects, plan: RankPlan) -> Costs:
    """costs[layer][module][k]: what removing k dims of that module adds to the divergence of the planned model.

    ``reference`` is in front of the first layer, and walks through all.
    """
    costs: Costs = []
    for index, of_layer in enumerate(prospects):
        costs.append({})
        for module, prospect in of_layer.items():
            share = max(1 - plan.ranks[index][module] / prospect.size, DISTANCE)
            with acting_as(stand_ins(prospects, plan, but=(index, module))):
                whole, points = reference.divergence(), {}
                for removed in {prospect.removed(min(each, MOST_REMOVED)) for each in (share, share + DISTANCE)}:
                    with acting_as(prospect.map(removed)):
                        points[removed] = reference.divergence() - whole
            costs[-1][module] = expected(prospect.curve, points)
        with acting_as(stand_ins(prospects, plan)):
            reference.advance()
    return costs


def within(costs: Costs, prospects: Prospects, plan: RankPlan, radius: float) -> Costs:
    """``costs`` that rise steeply, either way, where a module would change by more than the share ``radius``."""

    def bounded(cost: Sequence[float], planned: int) -> list[float]:
        reach = round(radius * (len(cost) - 1))
        near = [min(max(removed, planned - reach), planned + reach) for removed in range(len(cost))]
        return [cost[at] + abs(removed - at) * TOO_FAR for removed, at in enumerate(near)]

    return [
        {
            module: bounded(cost, prospects[index][module].size - plan.ranks[index][module])
            for module, cost in of_layer.items()
        }
        for index, of_layer in enumerate(costs)
    ]
