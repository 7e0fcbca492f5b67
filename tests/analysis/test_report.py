"""Figures draw the numbers of the tables, and the report needs nothing beside it."""

import html
import re
from pathlib import Path

import pytest

from analysis.__main__ import paper
from analysis.cells import groups
from analysis.figures import lines
from analysis.runs import load_runs
from analysis.specs import FIGURES, TABLES
from analysis.style import CYCLE, LOOKS
from modegpt.methods.registry import METHODS

SPECS = {spec.name: spec for spec in FIGURES}


def test_lines_are_the_numbers(store, tmp_path: Path) -> None:
    store.write(tmp_path, "methods")
    store.write(tmp_path, "methods_seeds")
    spec = SPECS["methods_perplexity"]
    [first, _] = groups(load_runs(tmp_path), spec.experiments, per_perplexity=True)
    [random] = [line for line in lines(spec, first) if line.series == "random"]
    assert random.xs == pytest.approx((9.9, 19.9, 29.9, 39.9, 49.9))  # achieved, not asked for
    assert random.ys == pytest.approx((5.1, 6.1, 7.1, 8.1, 9.1))
    assert random.spreads == pytest.approx((0.1,) * 5)


def test_layers_are_drawn_as_recorded(store, tmp_path: Path) -> None:
    store.write(tmp_path, "layer_sparsity")
    spec = SPECS["layer_sparsity"]
    [group] = groups(load_runs(tmp_path), spec.experiments, per_perplexity=False)
    drawn = {line.series: line for line in lines(spec, group)}
    assert drawn[0.5].xs == (0, 1, 2, 3, 4, 5)
    assert drawn[0.5].ys == pytest.approx((25, 35, 45, 55, 65, 75))


def test_every_method_has_a_look_of_its_own() -> None:
    assert set(LOOKS) == set(METHODS)
    assert len(set(LOOKS.values())) == len(LOOKS) and len({look[:2] for look in LOOKS.values()}) == len(LOOKS)
    assert len({look[1] for look in CYCLE}) == len(CYCLE), "markers tell them apart in grey"


def test_the_report_stands_alone(store, tmp_path: Path) -> None:
    results, output = tmp_path / "results", tmp_path / "paper"
    store.write(results, "seeds")
    store.write(results, "calibration_size", skip=[2])
    stale = output / "tables" / "gone.md"
    stale.parent.mkdir(parents=True)
    stale.write_text("from an earlier build")
    counts = paper(results, output)
    assert counts == {"records": 28, "left out": 0, "tables": 2, "figures": 1}
    assert not stale.exists()
    assert {path.suffix for path in (output / "figures").iterdir()} == {".png", ".pdf"}
    text = (output / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text) and "<script" not in text
    assert set(re.findall(r'href="#([^"]+)"', text)) == {"top", *re.findall(r'<section id="([^"]+)"', text)}
    assert "1 of 21 runs of `calibration_size`" in text
    assert all(spec.title in html.unescape(text) for spec in TABLES), "what was not run is named with its command"
    before = text
    paper(results, output)
    assert (output / "report.html").read_text(encoding="utf-8") == before
