"""The number behind a cell, from invented facts."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from analysis.cells import COMPARISONS, Cell, Column, Group, measure

PPL = "ppl_text_64"


def run(**facts: Any) -> Any:
    stages = [
        {"name": "loading", "seconds": 100.0},
        {"name": "compression", "seconds": 1.0},
        {"name": "statistics", "seconds": 4.0, "within": "compression"},
        {"name": "scoring", "seconds": 10.0, "within": "evaluation"},
    ]
    nats = {"dense": 1.25, "compressed": 1.75}
    metrics = {which: {"perplexity": {PPL: {"mean_nll": of_model}}} for which, of_model in nats.items()}
    return SimpleNamespace(facts=facts, record={"cost": {"stages": stages}, "metrics": metrics})


def test_numbers_of_one_run() -> None:
    own = run(**{PPL: 6.0, f"dense_{PPL}": 4.0, "achieved_sparsity": 0.25, f"before_{PPL}": 8.0, "zeroshot_mean": 0.5})
    expected = {
        "perplexity": 6.0,
        "perplexity_ratio": 1.5,
        "nats_lost": 0.5,
        "log_increase_per_percent": 0.5 / 25,
        "perplexity_before": 8.0,
        "compression_seconds": 5.0,
        "zeroshot_mean": 0.5,
        "zeroshot_piqa": None,
    }
    assert {metric: measure(own, metric, PPL) for metric in expected} == pytest.approx(expected)
    for metric in ("perplexity", "perplexity_ratio", "nats_lost", "log_increase_per_percent"):
        assert measure(own, metric, None) is None and measure(own, metric, "ppl_other_64") is None


def test_a_cell_is_the_mean_of_its_seeds_and_one_seed_has_no_spread() -> None:
    cell = Cell(values=(1.0, 2.0, 6.0))
    assert (cell.mean, cell.spread) == (3.0, pytest.approx(math.sqrt(7)))
    assert (Cell(values=(2.0,)).mean, Cell(values=(2.0,)).spread, Cell().mean) == (2.0, None, None)


def test_a_run_that_missed_its_rate_is_no_number_where_the_rate_has_to_be_met() -> None:
    runs = [
        SimpleNamespace(facts={"m": value, "target_sparsity": 0.3, "achieved_sparsity": removed}, variant="v", path="p")
        for value, removed in ((1.0, 0.2), (3.0, 0.305))
    ]
    group = Group("a model", None, None, runs=tuple(runs), experiments=())  # type: ignore[arg-type]
    assert group.cell(Column("c", "m"), {}).values == (1.0, 3.0)
    assert group.cell(Column("c", "m", within=0.01), {}).values == (3.0,)


def test_runs_are_compared_as_the_column_says() -> None:
    column, own, other = Column("c", "m"), (3.0, run()), (4.0, run())
    found = {name: compare(column, own, other) for name, compare in COMPARISONS.items() if name != "difference_stderr"}
    assert found == {"reduction": 0.25, "increase": -0.25, "ratio": 0.75, "difference": -1.0}
