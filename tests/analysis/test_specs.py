"""Every table and figure of the report, filled from a complete store of invented records: nothing is left out, and each
number is that of the records behind it.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from analysis import plus, specs
from analysis.cells import Cell, Column
from analysis.expected import agrees, experiment, screen
from analysis.figures import FigureSpec, panels
from analysis.runs import Run, load_runs
from analysis.specs import FIGURES, PARTS, TABLES
from analysis.tables import TableSpec, build

RATE = "compression.sparsity"
NOT_MEASURED = {"llama2_70b", "plus_zeroshot", "plus_paper_rates"}
"""Tables with a column that some of the records have no number for: an earlier score, or which items were right."""
NOT_INVENTED = {"plus_next_sentence"}
"""What no invented record has a score of."""


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    root = tmp_path_factory.mktemp("everything")
    for name in sorted({name for spec in (*TABLES, *FIGURES) for name in spec.experiments}):
        store.write(root, name)
    return screen(load_runs(root))[0]


def admitted(spec: TableSpec | FigureSpec, runs: list[Run]) -> list[Run]:
    of_files = {run.path: run for name in spec.experiments for run in experiment(name).runs(runs)}
    return [run for run in of_files.values() if agrees(run, spec.where)]


def check_cell(cell: Cell, column: Column, behind: dict[str, Run]) -> None:
    """The values are the records' own, at the rate that heads the column."""
    found = [behind[path] for path in cell.records]
    if RATE in column.where and "%" in column.label:
        assert column.label.startswith(f"{100 * column.where[RATE]:g} %")
    if column.compared is None:
        assert all(agrees(run, column.where) for run in found)
        names = [run.perplexities if column.metric == "perplexity" else [column.metric] for run in found]
        if all(name in run.facts for run, of_run in zip(found, names, strict=True) for name in of_run):
            for value, run, of_run in zip(cell.values, found, names, strict=True):
                assert any(value == pytest.approx(column.scale * run.facts[name]) for name in of_run)


@pytest.mark.parametrize("spec", [spec for spec in TABLES if spec.name not in NOT_INVENTED], ids=lambda spec: spec.name)
def test_a_table_shows_every_run_that_it_is_about(spec: TableSpec, runs: list[Run]) -> None:
    wanted = admitted(spec, runs)
    behind, shown = {run.path: run for run in wanted}, set()
    built = build(spec, runs)
    assert wanted and built
    for table in built:
        assert table.missing == ()
        assert len({column.label for column in table.columns if column.label not in ("of", "dense")}) > 0
        for _, rows in table.blocks:
            for row in rows:
                if row.labels[0] == "Dense":
                    assert any(cell.values for cell in row.cells)
                    continue
                for cell, column in zip(row.cells, table.columns, strict=True):
                    assert cell.refused is None and (cell.values or spec.name in NOT_MEASURED)
                    check_cell(cell, column, behind)
                    shown |= set(cell.records)
    assert shown == behind.keys()


@pytest.mark.parametrize("spec", FIGURES, ids=lambda spec: spec.name)
def test_a_figure_draws_every_setting_of_its_experiments(spec: FigureSpec, runs: list[Run]) -> None:
    wanted, drawn = admitted(spec, runs), panels(spec, runs)
    assert wanted and drawn
    for panel in drawn:
        assert panel.lines and all(len(line.xs) == len(line.ys) == len(line.spreads) > 0 for line in panel.lines)
        assert all(math.isfinite(y) for line in panel.lines for y in line.ys)
    if isinstance(spec.series, str):
        assert {line.series for panel in drawn for line in panel.lines} == {run.setting(spec.series) for run in wanted}


def test_every_part_names_its_tables_and_figures_once() -> None:
    assert [table for part in PARTS for table in part.tables] == list(TABLES)
    assert [figure for part in PARTS for figure in part.figures] == list(FIGURES)
    names = [spec.name for spec in (*TABLES, *FIGURES)]
    assert len({spec.name for spec in TABLES}) == len(TABLES) and len({spec.name for spec in FIGURES}) == len(FIGURES)
    assert all(names)


def test_the_path_of_a_store_is_no_part_of_a_run(runs: list[Run]) -> None:
    assert all(not Path(run.path).is_absolute() for run in runs)


def columns(value: Any) -> Iterator[Column]:
    """All that a specification, or a collection of them, holds; those that depend on what was recorded are left out."""
    if isinstance(value, Column):
        yield value
    elif isinstance(value, TableSpec):
        yield from columns(value.columns)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from columns(each)


@pytest.mark.parametrize("module", [specs, plus])
def test_quantities_are_shown_in_the_unit_that_they_are_said_to_have(module: ModuleType) -> None:
    shown = [each for value in vars(module).values() for each in columns(value)]
    assert {column.scale for column in shown if "(%)" in column.label} == {100}
    assert {column.scale for column in shown if "(GiB)" in column.label} <= {2**-30}
    assert {column.scale for column in shown if "(GFLOP" in column.label} <= {1e-9}
