"""Published orderings of methods, beside ours."""

from pathlib import Path

import pytest

from analysis.cells import Cell
from analysis.orderings import QUANTITIES, judge, markdown, orderings, place, published_orderings, rows, tally, tidy_csv
from analysis.published import load_published
from analysis.runs import load_runs


class Fixed:
    """A group in which each method has the values it is made with."""

    label = "a model"

    def __init__(self, **values: tuple[float, ...]) -> None:
        self.values = values

    def cell(self, column, where) -> Cell:
        return Cell(values=self.values.get(where["method"], ()))


@pytest.mark.parametrize(
    "quantity, first, second, outcome",
    [
        ("perplexity", (5.0,), (6.0,), "agrees"),
        ("perplexity", (6.0,), (5.0,), "differs"),
        ("zeroshot_mean", (60.0,), (50.0,), "agrees"),
        ("zeroshot_mean", (50.0,), (60.0,), "differs"),
        ("perplexity", (5.0, 7.0), (6.5, 6.7), "within the spread"),
        ("perplexity", (5.0, 5.2), (6.5, 6.7), "agrees"),
    ],
)
def test_the_better_side_wins_and_spread_decides(quantity: str, first: tuple, second: tuple, outcome: str) -> None:
    verdict = judge(Fixed(modegpt=first, slicegpt=second), "modegpt", "slicegpt", 0.3, QUANTITIES[quantity])
    assert verdict is not None and verdict.outcome == outcome


def test_one_side_alone_says_nothing() -> None:
    assert judge(Fixed(modegpt=(5.0,)), "modegpt", "slicegpt", 0.3, QUANTITIES["perplexity"]) is None


def test_the_paper_s_row_at_50_percent_gives_every_pair_in_its_order() -> None:
    found = published_orderings(
        [each for each in load_published() if each.table.startswith("MoDeGPT Table 3") and each.rate == "50"]
    )
    order = ["modegpt", "llm_surgeon", "slicegpt", "llm_pruner", "shortgpt"]  # 11.88, 15.38, 24.82, 31.05, 268.11
    assert {(first, second) for first, second, _, _ in found} == {
        (a, b) for i, a in enumerate(order) for b in order[i + 1 :]
    }
    [pair] = found["modegpt", "slicegpt", "50", "perplexity"]
    assert place(*pair).endswith("Llama-2-7B: 11.88, 24.82")


def test_a_higher_zero_shot_mean_is_better() -> None:
    found = published_orderings(
        [each for each in load_published() if "70B table" in each.table and each.metric == "zeroshot_avg_pct"]
    )
    assert list(found) == [("modegpt", "slicegpt", "30", "zeroshot_mean")]


def test_records_are_judged_and_shown(store, tmp_path: Path) -> None:
    store.write(tmp_path, "methods")
    found = orderings(load_runs(tmp_path))
    # the fixture's perplexity grows along the list of methods: slicegpt comes before modegpt, shortgpt after slicegpt
    outcomes = {(each.first, each.second): each.verdicts[0].outcome for each in found if each.rate == "50"}
    assert outcomes["modegpt", "slicegpt"] == "differs" and outcomes["slicegpt", "shortgpt"] == "agrees"
    lines = rows(found)
    assert len(tidy_csv(found).splitlines()) == 1 + len(lines)
    assert tally(found) in markdown(found) and str(len(lines)) in tally(found)
