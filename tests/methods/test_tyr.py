"""Tyr: the search keeps the budget at every move, is never worse than its start, and finds what there is to find."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from modegpt.allocation.ranks import ModuleBudget, removed_parameters
from modegpt.errors import UserError
from modegpt.methods.tyr import LEVELS, Ranks, Tyr
from modegpt.models import decoder_layers
from tests.methods.protocol_checks import (
    FORMS,
    check_compression,
    check_saved_and_generating,
    check_what_decides,
    check_zero_sparsity,
)
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model

SMALL = Tyr(rounds=2, generations=2, offspring=4, windows=(2, 4), survivors=(2,))
BUDGETS = [
    {"mlp": ModuleBudget(64, 1, 96), "query_key": ModuleBudget(16, 2, 128), "value_output": ModuleBudget(16, 1, 128)}
    for _ in range(4)
]
START: Ranks = [{"mlp": 40, "query_key": 10, "value_output": 10} for _ in range(4)]
WANTED = [14, 30, 53, 63]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def removed(ranks: Ranks) -> int:
    return sum(removed_parameters(of_layer, budget) for of_layer, budget in zip(ranks, BUDGETS, strict=True))


def far_off(ranks: Ranks, _: Sequence[int]) -> float:
    """Least where the MLPs have the wanted widths, which sum to what there is."""
    return sum((of_layer["mlp"] - width) ** 2 for of_layer, width in zip(ranks, WANTED, strict=True))


def test_offspring_are_different_keep_the_budget_and_stay_near() -> None:
    method, step = Tyr(offspring=40), 0.125
    mutants = method.mutants(START, START, BUDGETS, step, generator())
    assert len(mutants) == 40 and START not in mutants
    assert all(mutant not in mutants[:number] for number, mutant in enumerate(mutants))
    for mutant in mutants:
        assert removed(mutant) == removed(START)
        for of_layer, budget in zip(mutant, BUDGETS, strict=True):
            for name, rank in of_layer.items():
                shift = round(step * budget[name].size / budget[name].unit) * budget[name].unit
                assert budget[name].unit <= rank <= budget[name].size and rank % budget[name].unit == 0
                assert (rank - START[0][name]) % shift == 0 and abs(rank - START[0][name]) <= LEVELS * shift
    moved = [sum(a[name] != b[name] for a, b in zip(mutant, START, strict=True) for name in a) for mutant in mutants]
    assert min(moved) == 2 and 4 < max(moved) <= 8, "one to four shifts"
    many = Tyr(offspring=600).mutants(START, START, BUDGETS, step / 4, generator())
    assert max(sum(a[name] != b[name] for a, b in zip(each, START, strict=True) for name in a) for each in many) <= 8


def test_modules_that_are_not_free_stay() -> None:
    budgets = [{name: replace(module, frozen=name == "mlp") for name, module in layer.items()} for layer in BUDGETS]
    budgets[2] = {name: replace(module, frozen=True) for name, module in budgets[2].items()}
    for mutant in Tyr().mutants(START, START, budgets, 0.125, generator()):
        assert all(of_layer["mlp"] == 40 for of_layer in mutant) and mutant[2] == START[2]
    frozen = [{name: replace(module, frozen=True) for name, module in layer.items()} for layer in BUDGETS]
    assert Tyr().mutants(START, START, frozen, 0.125, generator()) == []


def test_the_search_finds_what_it_is_asked_for_coarse_to_fine() -> None:
    found, before, after = Tyr(generations=20).search(START, BUDGETS, far_off, num_batches=8, generator=generator())
    assert (before, after) == (far_off(START, []), far_off(found, [])) and after <= 4
    coarse, _, least = Tyr(rounds=1).search(START, BUDGETS, far_off, num_batches=8, generator=generator())
    assert removed(found) == removed(coarse) == removed(START)
    assert after < least and all(of_layer["mlp"] % 8 == 0 for of_layer in coarse)


def test_the_search_is_never_worse_than_its_start_and_seeded() -> None:
    """On an objective that says something else on every subset of the windows."""

    def noisy(ranks: Ranks, batches: Sequence[int]) -> float:
        key = hash((tuple(tuple(of_layer.values()) for of_layer in ranks), tuple(batches)))
        return float(torch.rand(1, generator=torch.Generator().manual_seed(abs(key))))

    every = range(5)
    for seed in range(5):
        found, before, after = Tyr().search(
            START, BUDGETS, noisy, num_batches=5, generator=torch.Generator().manual_seed(seed)
        )
        assert before == noisy(START, every) and after == noisy(found, every) and after <= before
    first, again = (Tyr().search(START, BUDGETS, far_off, num_batches=8, generator=generator()) for _ in range(2))
    assert first == again


def test_stages_look_at_more_windows_with_fewer_offspring() -> None:
    seen: list[int] = []

    def looked_at(ranks: Ranks, batches: Sequence[int]) -> float:
        seen.append(len(batches))
        return far_off(ranks, batches)

    method = Tyr(rounds=1, generations=1, offspring=6, windows=(2, 7, 16), survivors=(3, 2))
    method.search(START, BUDGETS, looked_at, num_batches=8, generator=generator())
    assert seen == [8] + [1] * 6 + [4] * 3 + [8] * 2


def test_what_is_found_diverges_less_than_uniform_ranks_and_is_what_the_model_has() -> None:
    model = dense_model("llama")
    task = task_of(model, 0.4)
    compressed = SMALL.compress(task)
    details = compressed.details
    assert 0 < details["divergence"] < details["uniform_divergence"]
    uniform = SMALL.modules.plan(task, None)
    ranks = [report["ranks"] for report in compressed.layers]
    assert ranks != uniform.ranks
    same = SMALL.modules.compress_to(task, replace(uniform, ranks=ranks))
    for ours, theirs in zip(decoder_layers(compressed.model), decoder_layers(same.model), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    ids = task.calibration.tokens.ids[:4]
    with torch.no_grad():
        log_p, log_q = (each(ids).logits.double().log_softmax(-1) for each in (model, compressed.model))
    assert details["divergence"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, r"method.rounds=0 is too small"),
        ({"step": 1.0}, r"method.step=1\.0 must lie between 0 and 1"),
        ({"windows": (8, 4), "survivors": (2,)}, r"method.windows=\[8, 4\] must be ascending"),
        ({"survivors": (2,)}, r"method.survivors=\[2\] must be a number for every stage"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tyr(**options)
    Tyr(windows=(4,), survivors=())


def test_by_default_a_stage_looks_at_more_and_keeps_fewer() -> None:
    assert (Tyr().windows, Tyr().survivors) == ((4, 16, 32), (4, 2)), "recorded runs have these"


def test_an_engine_of_one_width_is_refused() -> None:
    with pytest.raises(UserError, match="gives all layers one width"):
        replace(SMALL, engine="stock").check(task_of(dense_model("llama"), 0.3))


@pytest.mark.parametrize("form", FORMS)
def test_protocol(form: str) -> None:
    check_zero_sparsity(SMALL, form)
    check_compression(SMALL, form, 0.3, tolerance=0.01)


def test_what_decides() -> None:
    check_what_decides(SMALL, "llama", seed=True)


def test_saved_and_generating(tmp_path) -> None:
    check_saved_and_generating(SMALL, "llama", 0.4, tmp_path)
