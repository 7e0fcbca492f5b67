"""The report as one HTML file that needs nothing beside it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import claims, orderings
from analysis.formats import NONE, shown, value
from analysis.published import Beside
from analysis.rendering import render
from analysis.runs import Refusal, Run
from analysis.tables import Table


@dataclass(frozen=True)
class Section:
    """One entry of the side menu and what it leads to; ``kind`` is ``claims table picture commands`` or ``words``."""

    name: str
    title: str
    kind: str
    content: Any
    headings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chapter:
    """A group of sections, which the side menu folds."""

    title: str
    sections: tuple[Section, ...]


COMPARED = (
    "Model",
    "Method",
    "Rate (%)",
    "Calibration",
    "Metric",
    "Window",
    "Published",
    "Ours",
    "Difference",
    "Table, source (confidence)",
)
ORIGIN = ("Experiment", "Model", "Commit", "Code", "Processor", "Records")


def page(chapters: Sequence[Chapter], runs: Sequence[Run]) -> str:
    """The whole document."""
    return render("report.html", chapters=chapters, runs=runs, shown=shown, records=_records)


def judged(found: Sequence[claims.Claim]) -> Section:
    """The claims with their verdicts."""
    notes = (claims.tally(found), claims.RULE)
    return Section("claims", "What the paper claims, and what we measured", "claims", found, notes=notes)


def table(built: Table) -> Section:
    """A table of numbers."""
    return Section(f"table-{built.name}", built.title, "table", built)


def picture(name: str, title: str, png: Path) -> Section:
    """A figure, which becomes part of the page."""
    return Section(f"figure-{name}", f"Figure: {title}", "picture", base64.b64encode(png.read_bytes()).decode())


def compared(name: str, title: str, rows: Sequence[Beside]) -> Section:
    """Published figures with ours."""
    return Section(name, title, "words", [_compared(each) for each in rows], COMPARED)


def ordered(found: Sequence[orderings.Ordering]) -> Section:
    """Published orderings of methods with ours."""
    title = "Published orderings of methods, and ours"
    notes = (orderings.tally(found),)
    return Section("published_orderings", title, "words", orderings.rows(found), orderings.HEADINGS, notes)


def absent(commands: Sequence[tuple[str, str]]) -> Section:
    """Declared tables and figures without any record, each with the command that fills it."""
    return Section("absent", "Not run yet", "commands", commands)


def left_out(refused: Sequence[Refusal]) -> Section:
    """Records that may not enter a table."""
    rows = [(each.path, each.reason) for each in refused]
    return Section("refused", "Records left out", "words", rows, ("Record", "Reason"))


def origin(runs: Sequence[Run]) -> Section:
    """How many records each experiment, model, commit and processor has."""
    keys: dict[tuple[str, ...], int] = {}
    for run in runs:
        facts = run.facts
        key = (
            facts["experiment"],
            facts["model"],
            (facts["commit"] or "none")[:10],
            "changed since" if facts["dirty"] else "clean",
            str(run.record["provenance"]["hardware"].get("cpu")),
        )
        keys[key] = keys.get(key, 0) + 1
    rows = [(*key, str(count)) for key, count in sorted(keys.items())]
    return Section("records", "Where the records come from", "words", rows, ORIGIN)


def _compared(each: Beside) -> tuple[str, ...]:
    it = each.published
    return (
        it.model,
        it.method,
        it.rate,
        it.calibration,
        it.metric,
        it.window or NONE,
        it.value,
        NONE if each.ours.mean is None else value(each.ours.mean, 2),
        NONE if each.difference is None else f"{each.difference:+.2f}",
        f"{it.table}: {it.source} ({it.confidence})",
    )


def _records(built: Table) -> list[str]:
    """The records behind a table, each once."""
    return list(
        dict.fromkeys(path for _, rows in built.blocks for row in rows for cell in row.cells for path in cell.records)
    )
