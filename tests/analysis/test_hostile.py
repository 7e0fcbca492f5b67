"""What names of others make of the report: text. What an earlier build left: still there, or replaced whole."""

import csv
import html.parser
import re
from pathlib import Path

import pytest

from analysis import __main__ as analysis
from analysis.__main__ import main, paper
from analysis.formats import latex, markdown, tidy_csv
from analysis.runs import load_runs
from analysis.specs import TABLES
from analysis.tables import build

HOSTILE = {
    "script": '"><script>alert(1)</script>',
    "attribute": 'x" onmouseover="alert(1)" y="',
    "slash": "some/../../where",
    "long": "n" * 300,
    "formula of mathematics": r"a$\frac{",
    "formula of a spreadsheet": '=HYPERLINK("http://x")',
    "LaTeX": r"\input{x} ${}~^_%&#",
    "cells": "a|b`c`[d](javascript:e)\nf",
    "terminal": "\x1b[2J\u202e",
}


class Read(html.parser.HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, store) -> Path:
    """A report on one experiment with a model of every hostile name."""
    results = tmp_path_factory.mktemp("hostile") / "results"
    for number, name in enumerate(HOSTILE.values()):
        store.write(results, "seeds", model=name, weights=f"{number}", text=name)
        store.write(results, "zeroshot", model=name, weights=f"{number}", skip=[1])
    paper(results, results / "paper")
    return results


def test_the_report_holds_no_tag_and_no_link_of_others(built: Path) -> None:
    page = Read((built / "paper" / "report.html").read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("href", "src"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png")), (tag, attributes)
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names)) and not any(character.isspace() for name in names for character in name or "")


def test_every_model_has_its_files_inside_the_folder(built: Path) -> None:
    runs = load_runs(built)
    assert {run.facts["model"] for run in runs} >= set(HOSTILE.values())
    tables = [table for spec in TABLES for table in build(spec, runs)]
    names = {table.name for table in tables}
    assert len(names) == len(tables), "two models share a file"
    files = {path.relative_to(built / "paper" / "tables").as_posix() for path in (built / "paper" / "tables").iterdir()}
    assert files >= {f"{name}.{suffix}" for name in names for suffix in ("md", "tex", "csv")}
    assert len(names) >= len(HOSTILE), "a table a model"


def test_markdown_latex_and_csv_keep_their_form(built: Path) -> None:
    runs = load_runs(built)
    for spec in TABLES:
        for table in build(spec, runs):
            text = markdown(table)
            rows = [line for line in text.splitlines() if line.startswith("|")]
            assert len({line.replace(r"\|", "").count("|") for line in rows}) == 1
            outside_code = re.sub("`[^`]*`", "", text.replace(r"\`", ""))
            assert "<script" not in text and "\x1b" not in text and "](" not in outside_code.replace(r"\]", "")
            source = latex(table)
            assert r"\input" not in source and source.replace(r"\$", "").count("$") % 2 == 0
            assert source.count("{") - source.count(r"\{") == source.count("}") - source.count(r"\}")
            for row in csv.reader(tidy_csv(table).splitlines()):
                assert not any(cell.startswith(("=", "@", "\t")) for cell in row)
    front = (built / "README.md").read_text(encoding="utf-8")
    assert "<script" not in front and "\x1b" not in front


def test_an_unbalanced_command_of_a_record_stops_nothing(store, tmp_path: Path) -> None:
    store.write(tmp_path, "seeds", command="modegpt 'half of")
    assert paper(tmp_path, tmp_path / "paper")["records"] == 8


def test_a_build_that_fails_leaves_the_earlier_one(store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, output = tmp_path / "results", tmp_path / "paper"
    store.write(results, "seeds")
    paper(results, output)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    whole = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name == "report.html" and ".new-" in str(path):
            raise OSError(28, "No space left on device", str(target))
        return whole(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="No space"):
        paper(results, output)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.setattr(analysis, "markdown", lambda table: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        paper(results, output)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_place_that_cannot_be_written_is_one_line(store, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store.write(tmp_path / "results", "seeds")
    (tmp_path / "file").write_text("mine")
    for arguments in (["--output", str(tmp_path / "file")], ["--output", str(tmp_path / "file" / "below")]):
        assert main(["--results", str(tmp_path / "results"), *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "results"]
    assert main(["--results", str(tmp_path / "results"), "--output", str(tmp_path / "new")]) == 0
    assert str(tmp_path / "new" / "report.html") in capsys.readouterr().out
