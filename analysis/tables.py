"""Tables: a short declaration (`TableSpec`) and one function that fills it from the runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from analysis.cells import Cell, Column, Group, groups
from analysis.expected import Experiment
from analysis.ingredients import title
from analysis.runs import Run
from analysis.style import label
from modegpt.escaping import markdown, printable
from modegpt.files import json_sha256
from modegpt.records.store import slug

SPREAD = (
    "Means are over calibration seeds, ± is the sample standard deviation over the n seeds in brackets; no ±: one seed."
)

BEST = "Best of each column in bold, second best in italics or underlined."


@dataclass(frozen=True)
class TableSpec:
    """A table: rows are combinations of ``rows`` (setting keys) found in the runs of ``experiments`` under ``where``.

    ``columns``: quantities, or a function of a group that lists them. ``one_per_group`` makes a table of each group.
    ``per_text``: whether runs on different calibration texts are kept apart.
    """

    name: str
    title: str
    experiments: tuple[str, ...]
    rows: Mapping[str, str]  # setting key: heading
    columns: Any
    where: Mapping[str, Any] = field(default_factory=dict)
    per_perplexity: bool = True
    per_text: bool = True
    one_per_group: bool = False
    dense: bool = True
    note: str = ""


@dataclass(frozen=True)
class Row:
    """Labels, cells, and the rank mark of each cell: ``best``, ``second`` or nothing."""

    labels: tuple[str, ...]
    cells: tuple[Cell, ...]
    marks: tuple[str, ...]


def measured_row(labels: tuple[str, ...], columns: Sequence[Column], values: Mapping[str, Any], file: str) -> Row:
    """A row of what a benchmark's ``file`` has; a cell is empty where ``values`` lack its quantity."""
    cells = tuple(
        Cell((column.scale * values[column.metric],), (file,)) if column.metric in values else Cell()
        for column in columns
    )
    return Row(labels, cells, ("",) * len(cells))


@dataclass(frozen=True)
class Table:
    """A filled table: blocks of rows under a heading each, what is missing, and the commands that would produce it."""

    name: str
    title: str
    headings: tuple[str, ...]
    columns: tuple[Column, ...]
    blocks: tuple[tuple[str, tuple[Row, ...]], ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def caption(self) -> str:
        """Title and notes in one paragraph."""
        return " ".join((f"{self.title}.", *self.notes))


def build(spec: TableSpec, runs: Sequence[Run]) -> list[Table]:
    """Fill ``spec``; none if it has no runs at all, and no table or block that would be empty."""
    found = groups(runs, spec.experiments, per_perplexity=spec.per_perplexity, per_text=spec.per_text, where=spec.where)
    if spec.one_per_group:
        tables = [
            _table(spec, [group], suffix=f"_{group.model}" + (f"_{group.text}" if group.text else ""))
            for group in found
        ]
    else:
        tables = [_table(spec, found)] if found else []
    return [table for table in tables if table.blocks]


def across(tables: Sequence[Table], quantity: str, title: str, note: str) -> Table:
    """One column of ``tables``, which share their headings, model by model: a column for each of their blocks."""
    blocks = [
        (heading, rows, next(index for index, column in enumerate(table.columns) if column.label == quantity), table)
        for table in tables
        for heading, rows in table.blocks
    ]
    longest_first = sorted(blocks, key=lambda block: -len(block[1]))  # whose rows are in the order of all
    labels = list(dict.fromkeys(row.labels for _, rows, _, _ in longest_first for row in rows))
    by_label = [{row.labels: (row.cells[index], row.marks[index]) for row in rows} for _, rows, index, _ in blocks]
    numbers = [[found.get(each, (Cell(), "")) for found in by_label] for each in labels]
    windows = "; ".join(heading for heading, *_ in blocks if ", " in heading)
    general = [text for text in (SPREAD, BEST) if any(text in table.notes for table in tables)]
    return Table(
        name=tables[0].name,
        title=title,
        headings=tables[0].headings,
        columns=tuple(
            replace(table.columns[index], label=heading.partition(", ")[0]) for heading, _, index, table in blocks
        ),
        blocks=(
            (
                "",
                tuple(
                    Row(each, tuple(cell for cell, _ in row), tuple(mark for _, mark in row))
                    for each, row in zip(labels, numbers, strict=True)
                    if any(cell.values for cell, _ in row)
                ),
            ),
        ),
        notes=tuple(filter(None, (note, f"Columns: {markdown(windows)}." if windows else "", *general))),
        missing=(),
    )


def _table(spec: TableSpec, found: Sequence[Group], suffix: str = "") -> Table:
    columns = tuple(spec.columns(found[0]) if callable(spec.columns) else spec.columns)
    columns = tuple(
        column
        for column in columns
        if any(group.cell(column, {}).values or group.cell(column, {}).refused for group in found)
    )
    blocks = tuple((group.label, _rows(spec, group, columns)) for group in found)
    several = any(len(cell.values) > 1 for _, rows in blocks for row in rows for cell in row.cells)
    better = {column.better for column in columns}
    notes = [
        spec.note,
        SPREAD if several else "",
        BEST if better & {"lower", "higher"} else "",
    ]
    missing = [
        f"{_unquoted(group.model)}: {len(settings)} of {len(each.settings)} runs of `{each.name}` have no record; "
        f"`{_unquoted(each.command(_sibling(each, group)))}` runs them"
        for group in {(group.model, group.text): group for group in found}.values()
        for each, settings in group.missing
    ]
    return Table(
        name=_file_name(f"{spec.name}{suffix}"),
        title=spec.title + (f": {found[0].label}" if spec.one_per_group else ""),
        headings=tuple(spec.rows.values()),
        columns=columns,
        blocks=tuple((heading, rows) for heading, rows in blocks if rows),
        notes=tuple(filter(None, notes)),
        missing=tuple(missing),
    )


def _file_name(text: str) -> str:
    """``text``, or what is left of it in a file's name with its hash."""
    name = slug(text)
    return name if name == text else f"{name}-{json_sha256(text)[:8]}"


def _unquoted(text: str) -> str:
    """``text`` as it may stand beside or in code between backticks."""
    return printable(text).replace("`", "'")


def _sibling(experiment: Experiment, group: Group) -> Run:
    return next(run for run in experiment.runs(group.runs) if experiment.began(run))


def _rows(spec: TableSpec, group: Group, columns: Sequence[Column]) -> tuple[Row, ...]:
    keys = list(dict.fromkeys(tuple(run.setting(key) for key in spec.rows) for run in group.runs))
    order = _ranks(group, list(spec.rows))
    keys.sort(key=lambda values: [order[key](value) for key, value in zip(spec.rows, values, strict=True)])
    filled = [
        (values, [group.cell(column, dict(zip(spec.rows, values, strict=True))) for column in columns])
        for values in keys
    ]
    filled = [(values, cells) for values, cells in filled if any(cell.values or cell.refused for cell in cells)]
    # one comparison a column; where the rate is a row heading, one a column and rate
    contests: dict[Any, list[int]] = {}
    for index, (values, _) in enumerate(filled):
        contests.setdefault(
            tuple(value for key, value in zip(spec.rows, values, strict=True) if key == RATE), []
        ).append(index)
    marks = [[""] * len(columns) for _ in filled]
    for members in contests.values():
        for column_index, column in enumerate(columns):
            for index, mark in _marked([(index, filled[index][1][column_index].mean) for index in members], column):
                marks[index][column_index] = mark
    rows = [
        Row(tuple(_print(key, value) for key, value in zip(spec.rows, values, strict=True)), tuple(cells), tuple(mark))
        for (values, cells), mark in zip(filled, marks, strict=True)
    ]
    if spec.dense:
        cells = tuple(group.dense(column) for column in columns)
        first = Row(("Dense", *("" for _ in list(spec.rows)[1:])), cells, ("",) * len(columns))
        rows = [first] * any(cell.values for cell in cells) + rows
    return tuple(rows)


RATE = "compression.sparsity"


def _ranks(group: Group, keys: Sequence[str]) -> dict[str, Any]:
    """For each row key, how its values are sorted: as the experiment file lists them, else by size or name."""

    def rank(key: str) -> Any:
        listed = list(
            dict.fromkeys(settings[key] for each in group.experiments for settings in each.settings if key in settings)
        )
        return lambda value: (listed.index(value) if value in listed else len(listed), str(value))

    return {key: rank(key) for key in keys}


def _marked(means: Sequence[tuple[int, float | None]], column: Column) -> list[tuple[int, str]]:
    """Best and second best among three or more as they are printed; equal in print is equal."""
    printed = {index: round(mean, column.digits) for index, mean in means if mean is not None}
    ranked = sorted(set(printed.values()), reverse=column.better == "higher")
    if column.better is None or len(printed) < 3 or len(ranked) < 2:
        return []
    marks = {ranked[0]: "best", ranked[1]: "second"}
    return [(index, marks[value]) for index, value in printed.items() if value in marks]


def _print(key: str, value: Any) -> str:
    if key in (RATE, "module_rate"):
        return f"{100 * value:g} %"
    return title(value) if key == "experiments/ingredients" and value is not None else label(value)
