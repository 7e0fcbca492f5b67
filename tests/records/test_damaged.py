"""Damaged records: each is listed and left out, and stops no other."""

import copy
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest

from analysis.__main__ import paper
from analysis.runs import read_runs
from modegpt.records.cli import main
from modegpt.records.store import RecordStore, content_hash, identity, load_record
from tests.records.sample import sample_record


def sealed(record: dict) -> dict:
    """The record with the hash of what it now says, as if it had been written so; as it is where it has none."""
    try:
        record["identity"]["hash"] = identity(record["identity"]["decides"])
        return record | {"content_sha256": content_hash(record)}
    except (ValueError, TypeError, LookupError, AttributeError):
        return record


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The way to every member of nested mappings and lists."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        yield (*path, key)
        yield from places(member, (*path, key))


WRONG: tuple[Any, ...] = (None, 7, -1.5, "text", "\ud800", [], [1], {}, {"a": 1}, True, 10**400)


def test_a_damaged_record_of_any_inner_type_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Two hundred records, each with another member of another type; list, export and analysis show the good one."""
    store = RecordStore(tmp_path / "results")
    good = store.write(sample_record(seed=1))
    whole = load_record(good)
    draw = random.Random(0)
    for number in range(200):
        record = copy.deepcopy(whole)
        *path, last = draw.choice([place for place in places(record) if place[0] != "content_sha256"])
        node = record
        for key in path:
            node = node[key]
        node[last] = draw.choice(WRONG)
        damaged = tmp_path / "results" / "demo" / f"damaged-{number}" / "record.json"
        damaged.parent.mkdir()
        damaged.write_text(json.dumps(sealed(record) if number % 2 else record))
        (damaged.parent / "error.json").write_text(draw.choice(["", "[]", "{}", '{"experiment": 5}', "[" * 99_999]))
    for content in ("", "null", "[" * 100_000, '"text"', "\0", "{}"):
        place = tmp_path / "results" / "demo" / f"damaged-{len(content)}-text" / "record.json"
        place.parent.mkdir()
        place.write_text(content)
    name = whole["name"]
    for command in (
        ["list"],
        ["export", "--csv", str(tmp_path / "all.csv")],
        ["verify"],
        ["show", good.parent.as_posix()],
    ):
        assert main(["--root", str(store.root), *command]) in (0, 1)
        out = capsys.readouterr().out
        assert (name in out or command[0] != "list") and (
            out.count("left out: ") > 150 or command[0] in ("verify", "show")
        )
    assert whole["identity"]["hash"] in (tmp_path / "all.csv").read_text()
    runs, broken = read_runs(store.root)
    assert "demo/" + good.parent.name + "/record.json" in [run.path for run in runs] and len(broken) > 150
    assert all(each.path.startswith("demo/damaged-") and each.reason for each in broken)


def test_what_could_be_read_for_ever_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A pipe that nobody writes to, a sparse file of 20 GiB and a measurement of another form."""
    store = RecordStore(tmp_path / "results")
    good, huge = (store.write(sample_record(seed=seed)) for seed in (1, 2))
    os.truncate(huge, 20 * 2**30)
    os.mkfifo(tmp_path / "results" / "pipe.jsonl.gz")
    (tmp_path / "results" / "large.jsonl.gz").touch()
    os.truncate(tmp_path / "results" / "large.jsonl.gz", 20 * 2**30)
    (tmp_path / "results" / "bench").mkdir()
    (tmp_path / "results" / "bench" / "inference.json").write_text('{"compared": 5}')
    assert main(["--root", str(store.root), "list"]) == 0
    out = capsys.readouterr().out
    assert "1 finished, 0 failed, 3 left out" in out and out.count("left out: ") == 3
    for command in (
        ["export", "--csv", str(tmp_path / "all.csv")],
        ["verify"],
        ["unpack", "pipe"],
        ["unpack", "large"],
    ):
        assert main(["--root", str(store.root), *command]) in (0, 1, 2)
    counts = paper(store.root, tmp_path / "paper")
    assert (counts["records"], counts["left out"]) == (1, 4)
    assert "bench/inference.json" in (tmp_path / "paper" / "report.html").read_text() and good.is_file()


def test_an_export_that_fails_leaves_the_earlier_table(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, table = RecordStore(tmp_path / "results"), tmp_path / "all.csv"
    store.write(sample_record())
    table.write_text("an earlier table")

    def fails(frame: pandas.DataFrame, path: Path, **_: object) -> None:
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pandas.DataFrame, "to_csv", fails)
    assert main(["--root", str(store.root), "export", "--csv", str(table)]) == 2
    assert "No space left" in capsys.readouterr().err and table.read_text() == "an earlier table"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.csv", "results"]


def test_notes_of_failures_that_are_damaged_are_listed(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for number, content in enumerate(["", "[]", '{"experiment": "demo", "name": "x"}', "[" * 100_000]):
        place = tmp_path / "demo" / f"run-{number}" / "error.json"
        place.parent.mkdir(parents=True)
        place.write_text(content)
    notes = store.errors()
    assert [note["name"] for note in notes] == ["run-0", "run-1", "run-2", "run-3"]
    assert all("is damaged" in note["message"] for note in notes)
