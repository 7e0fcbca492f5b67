"""Archives: the same records in fewer files, found by every reader, and whole whatever happens."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modegpt.errors import UserError
from modegpt.records.archive import archived
from modegpt.records.cli import main
from modegpt.records.frame import load_records
from modegpt.records.packing import pack, unpack
from modegpt.records.schema import Record
from modegpt.records.store import RecordStore, load_record
from tests.records.sample import sample_record

SEEDS = range(7)


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    store = RecordStore(tmp_path / "results")
    for seed in SEEDS:
        store.write(sample_record(seed=seed))
    store.write(sample_record(experiment="other"))
    return store


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def done(store: RecordStore, record: Record) -> Record | None:
    decides = record["identity"]["decides"]
    return store.existing(experiment=record["experiment"], name=record["name"], decides=decides)


def test_pack_and_unpack_are_inverse_to_the_byte(store: RecordStore) -> None:
    before = files_of(store.root)
    assert pack(store, "demo") == len(SEEDS)
    packed = files_of(store.root)
    assert set(packed) == {"demo.jsonl.gz", *(name for name in before if name.startswith("other/"))}
    assert not (store.root / "demo").exists()
    assert unpack(store, "demo") == len(SEEDS)
    assert files_of(store.root) == before
    pack(store, "demo")
    assert files_of(store.root) == packed
    assert pack(store, "demo") == 0 and files_of(store.root) == packed


def test_an_archive_has_one_sorted_record_a_line_and_neither_name_nor_time(store: RecordStore) -> None:
    records = [json.loads(path.read_text()) for path in store.paths() if "demo" in path.parts]
    pack(store, "demo")
    content = (store.root / "demo.jsonl.gz").read_bytes()
    assert content[3:8] == bytes(5), "no flag, so no name; no time"
    lines = gzip.decompress(content).decode().splitlines()
    hashes = [json.loads(line)["identity"]["hash"] for line in lines]
    assert hashes == sorted(hashes) and len(set(hashes)) == len(SEEDS)
    assert archived(records) == archived(reversed(records)) == content


def test_every_reader_sees_one_store(store: RecordStore, capsys: pytest.CaptureFixture[str]) -> None:
    def seen() -> list[object]:
        frame = load_records(store.root)
        said = []
        for command in (["list"], ["verify"], ["show", "--json", frame["hash"][0][:9]]):
            assert main(["--root", str(store.root), *command]) == 0
            said.append(capsys.readouterr().out)
        records = [record for _, record in store.records()]
        return [frame.drop(columns="path").to_csv(), said, records, next(store.records("demo"))[1]]

    before = seen()
    pack(store, "demo")
    store.write(sample_record(seed=99))
    (late,) = [path for path in store.paths() if path.name == "record.json" and "demo" in path.parts]
    shutil.rmtree(late.parent)
    assert seen() == before
    pack(store, "other")
    assert seen() == before


def test_a_record_in_an_archive_is_found_and_named(store: RecordStore, capsys: pytest.CaptureFixture[str]) -> None:
    record = load_record(store.paths()[3])
    directory = store.home(record)
    pack(store, "demo")
    hash = record["identity"]["hash"]
    assert [entry.load() for entry in store.find(hash[:6])] == [record]
    path = store.place(record)
    assert path == store.root / f"demo.jsonl.gz#{hash[:12]}" and path in store.paths() and load_record(path) == record
    for reference in (hash[:8], str(path), str(path)[:-4], str(directory)):
        assert main(["--root", str(store.root), "show", reference]) == 0
        assert str(path) in capsys.readouterr().out
    for reference in (f"{path}0", str(path).partition("#")[0] + "#", f"{store.root}/absent.jsonl.gz#{hash}"):
        assert main(["--root", str(store.root), "show", reference]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_what_is_packed_is_not_computed_again(store: RecordStore) -> None:
    record = sample_record(seed=2)
    pack(store, "demo")
    known = done(store, record)
    assert known is not None and store.place(known).name.startswith("demo.jsonl.gz#")
    assert done(store, sample_record(seed=50)) is None
    path = store.write(sample_record(seed=2, created="2030-01-01T00:00:00+00:00"))
    assert load_record(path) == known, "the first writer wins, packed or not"
    assert store.problems() == [] and len(store.paths()) == len(SEEDS) + 1


def test_a_packed_run_that_is_overwritten_is_put_aside_and_replaced(store: RecordStore) -> None:
    pack(store, "demo")
    old = done(store, sample_record(seed=2))
    path = store.write(sample_record(seed=2, created="2030-01-01T00:00:00+00:00"), overwrite=True)
    aside = path.with_name("superseded-1.json")
    assert load_record(aside) == old
    assert len(store.paths()) == len(SEEDS) + 1 and path in store.paths() and store.problems() == []
    new = done(store, sample_record(seed=2))
    assert new is not None and new["created"].startswith("2030")
    assert pack(store, "demo") == 1
    assert done(store, sample_record(seed=2)) == new and not path.exists() and aside.exists()


def test_two_contents_under_one_identity_are_refused(store: RecordStore) -> None:
    pack(store, "demo")
    archive = (store.root / "demo.jsonl.gz").read_bytes()
    elsewhere = RecordStore(store.root.parent / "elsewhere")
    path = elsewhere.write(sample_record(seed=2, created="2030-01-01T00:00:00+00:00"))
    shutil.copytree(elsewhere.root / "demo", store.root / "demo")
    store.write(sample_record(seed=60))
    before = files_of(store.root)
    for step in (pack, unpack):
        with pytest.raises(UserError, match="one run with two contents") as refusal:
            step(store, "demo")
        assert "\n" not in str(refusal.value) and path.parent.name in str(refusal.value)
        assert files_of(store.root) == before and before["demo.jsonl.gz"] == archive
    (problem,) = store.problems()
    assert "another content" in problem


def test_only_records_go_from_a_directory(store: RecordStore) -> None:
    first, second, *_ = [path.parent for path in store.paths()]
    for name in ("scores.png", "notes.txt", "error.json", "superseded-1.json"):
        (first / name).write_text("{}")
    (second / "model").mkdir()
    (second / "model" / "weights.safetensors").write_text("weights")
    pack(store, "demo")
    assert sorted(path.name for path in first.iterdir()) == [
        "error.json",
        "notes.txt",
        "scores.png",
        "superseded-1.json",
    ]
    assert (second / "model" / "weights.safetensors").exists()
    assert sorted(path.name for path in (store.root / "demo").iterdir()) == sorted([first.name, second.name])


def test_a_note_of_an_error_is_no_error_where_an_archive_has_the_record(store: RecordStore) -> None:
    pack(store, "demo")
    for seed in (2, 70):
        record = sample_record(seed=seed)
        run = {"experiment": "demo", "name": record["name"], "decides": record["identity"]["decides"]}
        store.write_error(**run, stage="compress", message="no", command="modegpt")
    assert [note["identity"]["decides"]["seed"] for note in store.errors()] == [70]


@pytest.mark.parametrize("change", ["metric", "order", "twice", "experiment", "cut", "line", "text"])
def test_a_changed_archive_is_found(store: RecordStore, change: str) -> None:
    pack(store, "demo")
    path = store.root / "demo.jsonl.gz"
    content = path.read_bytes()
    lines = gzip.decompress(content).splitlines(keepends=True)
    if change == "metric":
        lines[3] = lines[3].replace(b'"mean_nll":1.5', b'"mean_nll":1.4')
    elif change == "order":
        lines[2], lines[3] = lines[3], lines[2]
    elif change == "twice":
        lines.insert(3, lines[3])
    elif change == "line":
        lines[3] = b"{}\n"
    elif change == "text":
        lines[3] = b"{\n"
    path.write_bytes(content[:-30] if change == "cut" else gzip.compress(b"".join(lines)))
    if change == "experiment":
        path = path.rename(store.root / "moved.jsonl.gz")
    problems = store.problems()
    assert problems and all(str(path) in problem and "\n" not in problem for problem in problems)
    assert change not in ("order", "line", "text") or "line 4 is not" in " ".join(problems)
    if change != "experiment":
        with pytest.warns(UserWarning, match=r"left out: .*demo\.jsonl\.gz"):
            frame = load_records(store.root)
        # a cut archive has no readable line; a second copy of a record is left out, and the first stays
        assert len(frame) == {"cut": 1, "twice": len(SEEDS) + 1}.get(change, len(SEEDS))
        with pytest.raises(UserError, match=r"demo\.jsonl\.gz"):
            unpack(store, "demo")
        assert path.exists() and not (store.root / "demo").exists()


def test_a_record_of_an_archive_has_a_name_of_its_own(store: RecordStore) -> None:
    pack(store, "demo")
    with pytest.raises(UserError, match=rf"{len(SEEDS)} records begin with '', name one"):
        load_record(store.root / "demo.jsonl.gz#")
    with pytest.raises(UserError, match="0 records begin with 'none'"):
        load_record(store.root / "demo.jsonl.gz#none")


def test_a_broken_record_is_not_packed(store: RecordStore) -> None:
    path = store.paths()[2]
    path.write_text(path.read_text().replace('"mean_nll": 1.5', '"mean_nll": 1.4', 1))
    before = files_of(store.root)
    with pytest.raises(UserError, match="content_sha256 does not match"):
        pack(store, "demo")
    assert files_of(store.root) == before


KILLED = """
import os, signal, sys
from modegpt.records import packing
from modegpt.records.store import RecordStore

root, step, name, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
original, calls = getattr(os, name), []

def killed(*arguments, **more):
    calls.append(0)
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **more)

setattr(os, name, killed)
getattr(packing, step)(RecordStore(root), "demo")
"""


@pytest.mark.parametrize(
    ("step", "name", "count"),
    [
        ("pack", "fsync", 1),
        ("pack", "replace", 1),
        ("pack", "fsync", 2),
        ("pack", "unlink", 2),
        ("pack", "unlink", 5),
        ("pack", "rmdir", 3),
        ("unpack", "link", 1),
        ("unpack", "link", 4),
        ("unpack", "fsync", 9),
        ("unpack", "unlink", 3),
    ],
)
def test_kill_9_at_any_moment_leaves_a_store_that_reads_right(
    store: RecordStore, repository: Path, step: str, name: str, count: int
) -> None:
    if step == "unpack":
        pack(store, "demo")
    before = [record for _, record in store.records()]
    command = [sys.executable, "-c", KILLED, str(store.root), step, name, str(count)]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(repository)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [record for _, record in store.records()] == before and store.problems() == []
    assert all(done(store, sample_record(seed=seed)) for seed in SEEDS)
    pack(store, "demo")
    assert [record for _, record in store.records()] == before
    assert not list(store.root.glob("demo/*/*")), "an empty directory may stay: a job might be about to write there"


def test_the_commands(store: RecordStore, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["--root", str(store.root), *arguments])
        return status, *capsys.readouterr()

    status, out, _ = run("pack")
    assert status == 0 and f"{store.root}/demo.jsonl.gz: 7 records, 7 of them from directories" in out
    assert out.count("\n") == 2 and "other.jsonl.gz: 1 records" in out
    assert "nothing to pack" in run("pack")[1]
    assert run("verify")[1] == "8 records, all whole and unchanged\n"
    assert run("unpack", "demo")[:2] == (0, f"{store.root}/demo: 7 records\n")
    for command in ("pack", "unpack"):
        status, out, err = run(command, "absent")
        assert status == 2 and out == "" and "absent" in err and err.count("\n") == 1


def test_the_committed_archives_are_whole(repository: Path) -> None:
    store = RecordStore(repository / "results")
    assert store.problems() == []
    assert {record["schema_version"] for _, record in store.records()} == {2}
