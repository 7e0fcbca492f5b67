"""The budget shared out again: costs are those of the planned model, and a plan is kept where it is better."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from modegpt.allocation.exchange import exchange
from modegpt.allocation.ranks import RankPlan
from modegpt.errors import UserError
from modegpt.methods.divergence import Predictions, Reference, acting_as, kl_divergence
from modegpt.methods.plus import again, method
from modegpt.methods.plus.again import marginal_costs, planned_again, stand_ins, within
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.methods.plus.sensitivity import Costs, curve_statistics
from modegpt.methods.prospects import PROSPECTS, Prospect
from modegpt.models import decoder_layers
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model, tokens

PLUS = MoDeGPTPlus(rounds=2)


def test_costs_are_what_a_module_adds_to_the_planned_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_model("llama")
    task = task_of(model, 0.4)
    modules = PLUS.faithful().statistics_read(task.family)
    layers = zip(decoder_layers(model), curve_statistics(task.calibration, modules), strict=True)
    prospects = [{name: PROSPECTS[name](task.family, *of_layer) for name in modules} for of_layer in layers]
    plan = PLUS.faithful().plan(task, None)
    seen: list[dict[int, float]] = []

    def noted(curve: list[float], points: dict[int, float]) -> list[float]:
        seen.append(points)
        return curve

    monkeypatch.setattr(again, "expected", noted)
    marginal_costs(Reference.of(model, tokens(), batch_size=2), prospects, plan)

    def divergence(ranks: list[dict[str, int]]) -> float:
        with torch.no_grad():
            dense = Predictions.of(model(tokens()).logits.log_softmax(-1).flatten(0, 1))
            with acting_as(stand_ins(prospects, replace(plan, ranks=ranks))):
                return kl_divergence(dense, model(tokens()).logits.log_softmax(-1).flatten(0, 1)) / len(dense.p)

    def with_rank(index: int, name: str, rank: int) -> list[dict[str, int]]:
        return [{**of_layer, **({name: rank} if index == at else {})} for at, of_layer in enumerate(plan.ranks)]

    names = list(modules)
    for index, name in ((0, "mlp"), (1, "value_output"), (2, "query_key")):
        size, points = prospects[index][name].size, seen[len(names) * index + names.index(name)]
        whole = divergence(with_rank(index, name, size))
        for removed, found in points.items():
            assert found == pytest.approx(
                divergence(with_rank(index, name, size - removed)) - whole, rel=1e-3, abs=1e-7
            )


def test_costs_rise_steeply_outside_the_radius() -> None:
    plan = RankPlan(ranks=[{"mlp": 6}], target=0.0, achieved=0.0)
    cost = [0.1 * removed for removed in range(11)]
    [bounded] = within([{"mlp": cost}], [{"mlp": Prospect(1, cost, lambda _: [])}], plan, 0.2)
    assert bounded["mlp"][2:7] == cost[2:7], "four are removed, and two more or fewer may be"
    assert bounded["mlp"][7] > 900 and bounded["mlp"][1] > 900


def test_the_budget_is_shared_out_within_the_radius() -> None:
    """Costs that would send every module elsewhere move each as far as it may, and the target is met."""
    task = task_of(dense_model("llama"), 0.4)
    start, budgets = PLUS.faithful().plan(task, None), PLUS.faithful().budgets(task)
    sizes = {name: module.size for name, module in budgets[0].items()}
    costs: Costs = [
        {name: [removed * 10.0 ** (index - 1) for removed in range(size + 1)] for name, size in sizes.items()}
        for index in range(len(start.ranks))
    ]
    prospects = [{name: Prospect(size, costs[0][name], lambda _: []) for name, size in sizes.items()}] * len(costs)
    found = exchange(within(costs, prospects, start, 0.2), budgets, start, cap=0.9)
    assert found.ranks != start.ranks and found.achieved == pytest.approx(start.achieved, abs=0.02)
    for ours, planned in zip(found.ranks, start.ranks, strict=True):
        assert all(abs(ours[name] - planned[name]) <= round(0.2 * size) + 1 for name, size in sizes.items())


@pytest.mark.parametrize("better", [True, False])
def test_a_plan_is_kept_where_the_whole_model_diverges_less(better: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_model("llama")
    task = task_of(model, 0.4)
    start = PLUS.faithful().plan(task, None)
    sizes = {name: module.size for name, module in PLUS.faithful().budgets(task)[0].items()}
    good, poor = (
        replace(start, ranks=[{name: int(share * size) for name, size in sizes.items()}] * len(start.ranks))
        for share in (1, 0.25)
    )
    radii: list[float] = []

    def noted(costs: Costs, prospects: object, plan: RankPlan, radius: float) -> Costs:
        radii.append(radius)
        return costs

    monkeypatch.setattr(again, "marginal_costs", lambda *_: [{}])
    monkeypatch.setattr(again, "within", noted)

    def replan(_: Costs) -> RankPlan:
        return good if better else poor

    arguments: dict[str, Any] = {"skip_layers": (), "rounds": 3}
    modules = PLUS.faithful().statistics_read(task.family)
    found = planned_again(task.calibration, modules, start, replan, **arguments)
    assert found is (good if better else start)
    assert radii == ([0.16, 0.16, 0.08] if better else [0.16, 0.08, 0.04]), "the same plan again is no better"


def test_the_method_reduces_to_the_plan_that_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(dense_model("llama"), 0.4)
    uniform, calls = PLUS.faithful().plan(task, None), []

    def found(*arguments: Any, **options: Any) -> RankPlan:
        first = arguments[2]
        assert first.ranks != uniform.ranks and first.target == uniform.target
        calls.append(options["rounds"])
        return uniform

    monkeypatch.setattr(method, "planned_again", found)
    assert [report["ranks"] for report in PLUS.compress(task).layers] == uniform.ranks and calls == [2]


@pytest.mark.parametrize("wrong", [lambda: MoDeGPTPlus(rounds=-1), lambda: MoDeGPTPlus(rounds=1, allocation="uniform")])
def test_rounds_need_measured_loss(wrong: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=r"method\.rounds=-?1: a number of times"):
        wrong()
