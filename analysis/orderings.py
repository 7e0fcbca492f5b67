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
from analysis.formats import pipes, value
from analysis.published import METHODS, Published, load_published
from analysis.runs import Run
from analysis.style import label
from modegpt.escaping import spreadsheet

EXPERIMENTS = (("real_models",), ("methods", "methods_seeds"))
"""Whose runs are asked, each on models of its own; released models come first."""
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


AGREES, DIFFERS, WITHIN = "agrees", "differs", "within the spread"


@dataclass(frozen=True)
class Verdict:
    """Our two numbers on one model; ``outcome`` is `AGREES`, `DIFFERS` or `WITHIN`."""

    group: Group
    first: Cell
    second: Cell
    outcome: str


@dataclass(frozen=True)
class Ordering:
    """``first`` is better than ``second`` at ``rate`` (%) in each published pair of figures."""

    first: str
    second: str
    rate: str
    column: Column
    published: tuple[tuple[Published, Published], ...]
    verdicts: tuple[Verdict, ...]


def orderings(runs: Sequence[Run]) -> list[Ordering]:
    """Every published ordering of two of our methods that records of ours can be asked about."""
    found = {
        quantity: [
            group for names in EXPERIMENTS for group in groups(runs, names, per_perplexity=quantity == "perplexity")
        ]
        for quantity in QUANTITIES
    }
    judged = []
    for (first, second, rate, quantity), pairs in published_orderings(load_published()).items():
        column = QUANTITIES[quantity]
        verdicts = tuple(
            verdict
            for group in found[quantity]
            if (verdict := judge(group, first, second, float(rate) / 100, column)) is not None
        )
        if verdicts:
            judged.append(Ordering(first, second, rate, column, tuple(pairs), verdicts))
    return judged


def published_orderings(
    published: Sequence[Published],
) -> dict[tuple[str, str, str, str], list[tuple[Published, Published]]]:
    """Better method, worse method, rate and quantity of every two methods in one published setting, and their figures.

    A setting is a table, a model, a calibration, a window and a rate.
    """
    settings: dict[tuple[str, ...], dict[str, Published]] = {}
    for each in published:
        method = METHODS.get(each.method.removesuffix("-Alpaca"), "dense")
        if method != "dense" and each.metric in METRICS and "allocation" not in each.table:
            setting = (each.table, each.model, each.calibration, each.window, each.metric, each.rate)
            settings.setdefault(setting, {})[method] = each
    found: dict[tuple[str, str, str, str], list[tuple[Published, Published]]] = {}
    for (*_, metric, rate), figures in settings.items():
        quantity = METRICS[metric]
        higher = QUANTITIES[quantity].better == "higher"
        order = sorted(figures.items(), key=lambda item: float(item[1].value), reverse=higher)
        for (first, better), (second, worse) in itertools.combinations(order, 2):
            if float(better.value) != float(worse.value):
                found.setdefault((first, second, rate, quantity), []).append((better, worse))
    return dict(sorted(found.items(), key=lambda item: (item[0][3], float(item[0][2]))))


def judge(group: Group, first: str, second: str, rate: float, column: Column) -> Verdict | None:
    """Our order of the two at ``rate`` (a share); None without both."""
    ours, others = (group.cell(column, {"method": method, "compression.sparsity": rate}) for method in (first, second))
    outcome = compared(ours, others, column)
    return None if outcome is None else Verdict(group, ours, others, outcome)


def compared(first: Cell, second: Cell, column: Column) -> str | None:
    """Whether the first mean is the better one; None without both.

    Means that differ by no more than the spread of their difference are `WITHIN` it.
    """
    if first.mean is None or second.mean is None:
        return None
    gain = (second.mean - first.mean) * (1 if column.better == "lower" else -1)
    if abs(gain) <= math.hypot(first.spread or 0.0, second.spread or 0.0):
        return WITHIN
    return AGREES if gain > 0 else DIFFERS


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
            verdict.group.label,
            *(
                value(cell.mean, each.column.digits)
                for cell in (verdict.first, verdict.second)
                if cell.mean is not None
            ),
            verdict.outcome,
            "; ".join(place(*pair) for pair in each.published),
        )
        for each in found
        for verdict in each.verdicts
    ]


def place(better: Published, worse: Published) -> str:
    """Where the two figures stand, and both of them."""
    return f"{better.table}, {better.model}: {better.value}, {worse.value}"


def tally(found: Sequence[Ordering]) -> str:
    """How many there are of each outcome, in a sentence."""
    outcomes = [verdict.outcome for each in found for verdict in each.verdicts]
    return (
        f"Of {len(outcomes)} comparisons {outcomes.count(AGREES)} agree with the published order, "
        f"{outcomes.count(DIFFERS)} differ, {outcomes.count(WITHIN)} lie within the spread over seeds."
    )


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
    csv.writer(out, lineterminator="\n").writerows([HEADINGS, *(map(spreadsheet, row) for row in rows(found))])
    return out.getvalue()
