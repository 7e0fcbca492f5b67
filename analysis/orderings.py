"""Which of two methods published tables put first, and whether our records on other models do as well.

Levels cannot be compared across models, windows and texts; the order of two methods at one rate can.
"""

import csv
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.cells import Cell, Column, Group, groups
from analysis.formats import figure, pipes
from analysis.published import METHODS, Published, load_published
from analysis.runs import Run
from analysis.style import label

EXPERIMENTS = ("methods", "methods_seeds")
QUANTITIES = {
    "perplexity": Column("perplexity", "perplexity", "lower"),
    "zeroshot_mean": Column("zero-shot mean (%)", "zeroshot_mean", "higher", scale=100, digits=1),
}
METRICS = {
    "wikitext2_ppl": "perplexity",
    "zeroshot_avg_pct": "zeroshot_mean",
    "zeroshot5_avg_pct": "zeroshot_mean",
    "avg5_pct": "zeroshot_mean",
}
"""Our quantity for each published metric."""


@dataclass(frozen=True)
class Verdict:
    """Our two numbers on one model."""

    group: str
    first: Cell
    second: Cell
    outcome: str  # agrees, differs, within the spread


@dataclass(frozen=True)
class Ordering:
    """``first`` is published as better than ``second`` at ``rate`` (%); ``tables`` say where, with both figures."""

    first: str
    second: str
    rate: str
    column: Column
    tables: tuple[str, ...]
    verdicts: tuple[Verdict, ...]


def orderings(runs: Sequence[Run]) -> list[Ordering]:
    """Every published ordering of two of our methods that records of ours can be asked about."""
    found = {quantity: groups(runs, EXPERIMENTS, per_perplexity=quantity == "perplexity") for quantity in QUANTITIES}
    published = published_orderings(load_published())
    judged = []
    for (first, second, rate, quantity), tables in published.items():
        column = QUANTITIES[quantity]
        verdicts = tuple(
            verdict
            for group in found[quantity]
            if (verdict := judge(group, first, second, float(rate) / 100, column)) is not None
        )
        if verdicts:
            judged.append(Ordering(first, second, rate, column, tuple(tables), verdicts))
    return judged


def published_orderings(rows: Sequence[Published]) -> dict[tuple[str, str, str, str], list[str]]:
    """Better method, worse method, rate and quantity of every pair that shares a table, a model and a setting, and where that is."""
    tables: dict[tuple, dict[str, tuple[float, str]]] = {}
    for row in rows:
        method = METHODS.get(row.method.removesuffix("-Alpaca"))
        if method not in (None, "dense") and row.metric in METRICS and "allocation" not in row.table:
            tables.setdefault((row.table, row.model, row.calibration, row.window, row.metric, row.rate), {})[method] = (
                float(row.value),
                row.value,
            )
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for (table, model, _, _, metric, rate), values in tables.items():
        quantity = METRICS[metric]
        order = sorted(values, key=lambda method: values[method][0], reverse=QUANTITIES[quantity].better == "higher")
        for first, second in itertools.combinations(order, 2):
            if values[first][0] != values[second][0]:
                found.setdefault((first, second, rate, quantity), []).append(
                    f"{table}, {model}: {values[first][1]}, {values[second][1]}"
                )
    return dict(sorted(found.items(), key=lambda item: (item[0][3], float(item[0][2]))))


def judge(group: Group, first: str, second: str, rate: float, column: Column) -> Verdict | None:
    """Our order of the two, undecided where the means differ by less than the spread of their difference; None without both."""
    ours = [group.cell(column, {"method": method, "compression.sparsity": rate}) for method in (first, second)]
    if any(cell.mean is None for cell in ours):
        return None
    gain = (ours[1].mean - ours[0].mean) * (1 if column.better == "lower" else -1)
    spread = math.hypot(*(cell.spread or 0.0 for cell in ours))
    return Verdict(
        group.label, *ours, outcome="within the spread" if abs(gain) <= spread else "agrees" if gain > 0 else "differs"
    )


HEADINGS = (
    "Better",
    "Worse",
    "Rate (%)",
    "Measured by",
    "Ours on",
    "Better one",
    "Worse one",
    "Our order",
    "Published",
)


def rows(found: Sequence[Ordering]) -> list[tuple[str, ...]]:
    """A line a verdict."""
    return [
        (
            label(each.first),
            label(each.second),
            each.rate,
            each.column.label,
            verdict.group,
            *(figure(cell.mean, each.column.digits) for cell in (verdict.first, verdict.second)),
            verdict.outcome,
            "; ".join(each.tables),
        )
        for each in found
        for verdict in each.verdicts
    ]


def tally(found: Sequence[Ordering]) -> str:
    """How many there are of each outcome, in a sentence."""
    outcomes = [verdict.outcome for each in found for verdict in each.verdicts]
    return f"Of {len(outcomes)} comparisons {outcomes.count('agrees')} agree with the published order, {outcomes.count('differs')} differ, {outcomes.count('within the spread')} lie within the spread over seeds."


def markdown(found: Sequence[Ordering]) -> str:
    """The verdicts as a Markdown table."""
    return (
        "\n".join(
            [
                "### Published orderings of methods, and ours",
                "",
                tally(found),
                "",
                pipes(HEADINGS),
                pipes(["---"] * len(HEADINGS)),
                *map(pipes, rows(found)),
            ]
        )
        + "\n"
    )


def tidy_csv(found: Sequence[Ordering]) -> str:
    """The verdicts as CSV."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([HEADINGS, *rows(found)])
    return out.getvalue()
