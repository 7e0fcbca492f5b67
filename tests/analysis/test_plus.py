"""Comparisons with another run of the same seed, and the tables of modegpt_plus, on invented records."""

from dataclasses import replace
from math import log
from pathlib import Path
from statistics import stdev

import pytest

from analysis import plus
from analysis.cells import Column, groups
from analysis.figures import draw, lines, panels
from analysis.runs import load_runs
from analysis.tables import RATE, Table, build
from modegpt.evaluation.items import pack
from modegpt.records.store import RecordStore

TABLES = {spec.name: spec for spec in plus.TABLES}
FIGURES = {spec.name: spec for spec in plus.FIGURES}
COMPARED = ("modegpt", "modegpt_plus")


def write(store, root: Path, name: str, **changes) -> None:
    """The records of an experiment, of ``methods`` those that are compared."""
    other = [
        index
        for index, settings in enumerate(store.experiment(name).settings)
        if settings.get("method", "modegpt") not in COMPARED
    ]
    store.write(root, name, skip=other, **changes)


def table(root: Path, name: str) -> Table:
    [built] = build(TABLES[name], load_runs(root))
    return built


def row(built: Table, label: str) -> dict:
    [found] = [row for row in built.blocks[0][1] if row.labels == (label,)]
    return dict(zip((column.label for column in built.columns), found.cells, strict=True))


def excess(store, method: str, rate: float, seed: int) -> float:
    return log((4 + 10 * rate * (1 + store.method_position(method)) + 0.1 * seed) / 4)


def test_excess_and_its_reduction(store, tmp_path: Path) -> None:
    for name in (*plus.OWN, "plus_uniform"):
        write(store, tmp_path, name)
    built = table(tmp_path, "plus_excess")
    assert built.missing == (), "what the other methods owe is not this table's concern"
    cells = row(built, "30 %")
    own, other = ([excess(store, method, 0.3, seed) for seed in range(3)] for method in ("modegpt_plus", "modegpt"))
    assert sorted(cells["MoDeGPT plus"].values) == pytest.approx(own)
    assert sorted(cells["MoDeGPT (entropic)"].values) == pytest.approx(other)
    assert sorted(cells["Less than entropic (%)"].values) == pytest.approx(
        sorted(100 * (1 - a / b) for a, b in zip(own, other, strict=True))
    )
    assert cells["Less than entropic (%)"].mean < 0, "invented records: plus comes later in the list, and is worse"
    assert cells["Less than entropic (%)"].spread > 0
    assert len(cells["Less than uniform (%)"].records) == 6
    assert cells["Less than uniform (%)"].mean == pytest.approx(cells["Less than entropic (%)"].mean)


def test_a_comparison_needs_both_sides(store, tmp_path: Path) -> None:
    for name in plus.OWN:
        write(store, tmp_path, name)
    [lost] = [
        run
        for run in load_runs(tmp_path)
        if run.setting("method") == "modegpt" and run.setting(RATE) == 0.3 and run.setting("seed") == 0
    ]
    (tmp_path / lost.path).unlink()
    built = table(tmp_path, "plus_excess")
    assert {name: cell.refused for name, cell in row(built, "30 %").items()} == {
        "MoDeGPT (entropic)": "incomplete",
        "MoDeGPT plus": None,
        "Less than entropic (%)": "incomplete",
    }
    assert row(built, "20 %")["Less than entropic (%)"].values
    [missing] = built.missing
    assert "1 of 90 runs of `methods`" in missing


def test_comparisons_pair_seeds(store, tmp_path: Path) -> None:
    write(store, tmp_path, "plus_cost")
    [group] = groups(load_runs(tmp_path), ["plus_cost"], per_perplexity=False)
    weight = {method: 1 + store.method_position(method) for method in COMPARED}
    column = Column("x", "compression_seconds", compared="ratio", against={"method": "modegpt"})
    assert group.cell(column, {"method": "modegpt_plus"}).values == pytest.approx(
        [weight["modegpt_plus"] / weight["modegpt"]] * 3
    )
    difference = Column("x", "compression_seconds", compared="difference", against={"method": "modegpt"}, scale=2)
    assert group.cell(difference, {"method": "modegpt_plus"}).values == pytest.approx(
        [2 * 4.0 * (weight["modegpt_plus"] - weight["modegpt"])] * 3
    )
    assert group.cell(column, {"method": "modegpt"}).values == (1, 1, 1)
    assert group.cell(replace(column, floor=4.0 * weight["modegpt"]), {"method": "modegpt_plus"}).values
    assert not group.cell(replace(column, floor=4.1 * weight["modegpt"]), {"method": "modegpt_plus"}).values, (
        "next to nothing is not compared with"
    )


def test_ablation(store, tmp_path: Path) -> None:
    store.write(tmp_path, "plus_ablation")
    alone, all_but_one = table(tmp_path, "plus_alone"), table(tmp_path, "plus_all_but_one")
    labels = [each.labels[0] for each in alone.blocks[0][1]]
    assert labels[0].startswith("None: the paper's") and labels[-1].startswith("All")
    assert all_but_one.blocks[0][1][0].labels[0].startswith("All")
    names = list(dict.fromkeys(settings[plus.INGREDIENTS] for settings in store.experiment("plus_ablation").settings))
    assert len(labels) + len(all_but_one.blocks[0][1]) == len(names) + 1, "all of them, and `all` in both"
    assert {column.label for column in alone.columns} == {
        f"{rate} %{more}" for rate in (10, 30, 50) for more in ("", ": less (%)")
    }
    values = [log((4 + 10 * 0.5 * (1 + position)) / 4) for position in range(len(names))]
    cells = next(each for each in all_but_one.blocks[0][1] if each.labels == ("Without refit",)).cells
    position = names.index("without_refit")
    assert cells[-2].mean == pytest.approx(values[position])
    assert cells[-1].mean == pytest.approx(100 * (values[position] / values[names.index("all")] - 1))
    assert alone.blocks[0][1][0].cells[1].mean == 0


def test_windows_and_texts_stand_beside_the_main_runs(store, tmp_path: Path) -> None:
    for name in plus.OWN:
        write(store, tmp_path, name)
    store.write(tmp_path, "plus_samples")
    store.write(tmp_path, "plus_domain", text="wikitext2")
    assert [each.labels[0] for each in table(tmp_path, "plus_samples").blocks[0][1]] == ["8", "32", "128"]
    domain = table(tmp_path, "plus_domain")
    assert {each.labels[0] for each in domain.blocks[0][1]} == {"tiny corpus", "WikiText-2"}
    assert all(len(cell.values) == 3 for each in domain.blocks[0][1] for cell in each.cells)
    assert domain.missing == ()


def test_named_series_are_drawn(store, tmp_path: Path) -> None:
    for name in (*plus.OWN, "plus_uniform"):
        write(store, tmp_path, name)
    store.write(tmp_path, "plus_domain", text="wikitext2")
    runs = load_runs(tmp_path)
    spec = FIGURES["plus_excess"]
    [first, _] = groups(runs, spec.experiments, per_perplexity=True, where=spec.where)
    drawn = {line.series: line for line in lines(spec, first)}
    assert list(drawn) == ["modegpt", "modegpt_uniform", "modegpt_plus"]
    assert drawn["modegpt"].ys == pytest.approx(drawn["modegpt_uniform"].ys)
    assert drawn["modegpt_plus"].xs == pytest.approx((9.9, 19.9, 29.9, 39.9, 49.9))
    spec = FIGURES["plus_domain"]
    [first, _] = groups(runs, spec.experiments, per_perplexity=True, per_text=False, where=spec.where)
    assert {line.series: line.xs for line in lines(spec, first)} == dict.fromkeys(
        COMPARED, ("tiny corpus", "WikiText-2")
    )
    assert draw(spec, panels(spec, runs)).axes


def test_the_error_of_a_difference_in_accuracy_comes_from_the_items(store, tmp_path: Path) -> None:
    for name in ("zeroshot", "zeroshot_seeds"):
        write(store, tmp_path, name)
    assert row(table(tmp_path, "plus_paper_rates"), "30 %")["Standard error of that"].values == (), (
        "these records have no items"
    )
    paper, own = ({"num_items": 4, "right": pack(right)} for right in ([1, 1, 1, 0], [1, 0, 1, 1]))
    for run in load_runs(tmp_path):
        for task, score in run.record["metrics"]["compressed"]["zeroshot"].items():
            if task != "mean":
                score |= own if run.setting("method") == "modegpt_plus" else paper
        (tmp_path / run.path).unlink()
        RecordStore(tmp_path).write({key: value for key, value in run.record.items() if key != "content_sha256"})
    cells = row(table(tmp_path, "plus_paper_rates"), "30 %")
    num_tasks = 5
    assert cells["Standard error of that"].values == pytest.approx(
        [100 * stdev([0, -1, 0, 1]) / 2 / num_tasks**0.5] * 3
    )
    assert cells["Plus over entropic (points)"].mean < 0 and len(cells["Standard error of that"].records) == 6
