"""The paper's claims: quoted from the list, judged by one rule, on invented records whose numbers are known."""

import re
from pathlib import Path

import pytest

from analysis import claims
from analysis.cells import Cell
from analysis.claims import FAILS, HOLDS, IN_PART, NOT, NOT_MEASURABLE, PARTLY, REPRODUCED, UNDECIDED, Claim, Measured
from analysis.runs import load_runs


def claim(*outcomes: str | None) -> Claim:
    return Claim("", "", "", (), tuple(Measured("a model", "", outcome) for outcome in outcomes), "")


@pytest.mark.parametrize(
    "outcomes, verdict",
    [
        ((), NOT_MEASURABLE),
        ((None,), NOT_MEASURABLE),
        ((HOLDS, HOLDS, None), REPRODUCED),
        ((FAILS, FAILS), NOT),
        ((HOLDS, FAILS), PARTLY),
        ((HOLDS, UNDECIDED), PARTLY),
        ((FAILS, UNDECIDED), PARTLY),
        ((IN_PART, IN_PART), PARTLY),
        ((UNDECIDED,), PARTLY),
    ],
)
def test_the_verdict_follows_the_rule(outcomes: tuple, verdict: str) -> None:
    assert claim(*outcomes).verdict == verdict


@pytest.mark.parametrize(
    "values, sign, outcome",
    [
        ((), None, None),
        ((90.0,), None, HOLDS),
        ((89.9,), None, FAILS),
        ((89.9,), 0.0, IN_PART),
        ((-1.0,), 0.0, FAILS),
        ((89.0, 90.5), None, UNDECIDED),
        ((88.0, 94.0), 0.0, UNDECIDED),
        ((91.9, 92.1), None, HOLDS),
    ],
)
def test_a_figure_is_reached_missed_or_within_the_spread(values: tuple, sign: float | None, outcome: str) -> None:
    assert claims.reached(Cell(values), 90.0, sign) == outcome


def test_without_records_nothing_is_measurable(tmp_path: Path) -> None:
    assert {each.verdict for each in claims.claims([], tmp_path)} == {NOT_MEASURABLE}


def test_a_claim_quotes_no_figure_that_is_not_in_the_list(tmp_path: Path) -> None:
    found = claims.claims([], tmp_path)
    for each in found:
        assert each.sources, each.title
        text = each.claimed.replace("WikiText-2", "").replace("A100", "")
        for model in {source.model for source in each.sources}:
            text = text.replace(model, "").replace(model.removeprefix("Llama-2-"), "")
        listed = " ".join(
            f"{source.value} {source.rate} {source.window}".replace("-", " ") for source in each.sources
        ).split()
        quoted = re.findall(r"\d+h\d+m|\d+(?:\.\d+)?", text)
        assert quoted and set(quoted) <= set(listed), each.title
    values = {source.value for each in found for source in each.sources}
    assert values >= {"90-95", "98", "46", "7.51", "9.06", "60.78", "53.47", "4h09m", "8h26m", "23.33", "128"}


def test_orders_and_savings_are_measured(store, tmp_path: Path) -> None:
    """The fixture's perplexity grows along the list of methods, and each run counts the same FLOPs."""
    for name in ("methods", "methods_seeds", "compression_cost", "zeroshot", "zeroshot_seeds", "calibration_size"):
        store.write(tmp_path, name)
    found = {each.title: each for each in claims.claims(load_runs(tmp_path), tmp_path)}
    assert found["Lower perplexity than SliceGPT"].verdict == NOT  # slicegpt comes before modegpt in the list
    assert found["Less compute than gradient-based compression"].verdict == NOT  # none is saved
    [row] = found["Better zero-shot mean than ShortGPT"].measured
    assert row.model == "tiny-llama" and row.outcome == FAILS
    kept = found["Zero-shot accuracy is kept"]
    weight = 1 + store.method_position("modegpt")
    mean = 100 * sum((0.86 - 0.05 * 0.25 * weight - 0.01 * seed) / 0.86 for seed in range(3)) / 3
    assert kept.measured[0].text.startswith(f"{mean:.1f} ± 1.2 (3) at 25 %")


def test_a_model_that_guesses_has_no_accuracy_to_keep() -> None:
    class Group:
        def __init__(self, task: str, value: float) -> None:
            scored = {task: {"value": value}, "mean": {"value": value, "stderr": 0.01}}
            run = type("Run", (), {"record": {"metrics": {"dense": {"zeroshot": scored}}}})
            self.runs = (run,)

    assert claims.guesses(Group("piqa", 0.51)) and not claims.guesses(Group("piqa", 0.53))
    assert claims.guesses(Group("next_sentence", 0.26)) and not claims.guesses(Group("tiny_story", 0.1))


def test_durations() -> None:
    assert claims.seconds("4h09m") == 4 * 3600 + 9 * 60
