"""The store: whole or absent, once, and never silently changed."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from modegpt.errors import UserError
from modegpt.files import STALE_SECONDS
from modegpt.records import store as store_module
from modegpt.records.frame import load_records
from modegpt.records.store import PARTIAL, RecordStore, canonical, identity, load_record, slug
from tests.processes import CLEAN, ended_well
from tests.records.sample import sample_record


def decides_of(record: dict) -> dict:
    return record["identity"]["decides"]


def files_of(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_written_record_comes_back_whole(tmp_path: Path) -> None:
    record = sample_record()
    path = RecordStore(tmp_path).write(record)
    loaded = load_record(path)
    assert {key: value for key, value in loaded.items() if key in record and key != "identity"} == {
        key: value for key, value in record.items() if key != "identity"
    }
    hash = identity(decides_of(record))
    assert loaded["identity"] == {"hash": hash, "decides": decides_of(record)}
    assert path.relative_to(tmp_path) == Path("demo") / f"tiny-llama-modegpt-0.3-{hash[:8]}" / "record.json"
    assert files_of(tmp_path) == [str(path.relative_to(tmp_path))]


def test_identity_ignores_order_and_sees_every_value() -> None:
    assert identity({"a": 1, "b": {"c": [1, 2], "d": None}}) == identity({"b": {"d": None, "c": [1, 2]}, "a": 1})
    variants = [{"a": 1}, {"a": 2}, {"a": "1"}, {"a": True}, {"a": None}, {"b": 1}, {"a": [1]}, {}]
    assert len({identity(variant) for variant in variants}) == len(variants)
    with pytest.raises(UserError, match=r"a\.b\[1\] is nan"):
        canonical({"a": {"b": [0.0, float("nan")]}})


def test_done_is_told_from_not_done(tmp_path: Path) -> None:
    store, record = RecordStore(tmp_path), sample_record()
    place = {"experiment": record["experiment"], "name": record["name"]}
    assert store.existing(**place, decides=decides_of(record)) is None
    store.write(record)
    assert store.existing(**place, decides=decides_of(record))["name"] == record["name"]
    assert store.existing(**place, decides=decides_of(sample_record(seed=1))) is None


def test_write_once_unless_asked(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    first, second = sample_record(), sample_record(created="2026-01-01T00:00:00+00:00")
    path = store.write(first)
    before = path.read_bytes()
    assert store.write(second) == path
    assert path.read_bytes() == before
    for number in (1, 2):
        store.write(second, overwrite=True)
        assert path.with_name(f"superseded-{number}.json").exists()
    assert path.with_name("superseded-1.json").read_bytes() == before
    assert load_record(path)["created"] == second["created"]
    assert len(load_records(tmp_path)) == 1


def test_another_run_in_the_same_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RecordStore(tmp_path)
    monkeypatch.setattr(store, "directory", lambda **_: tmp_path / "demo" / "taken")
    one, other = sample_record(sparsity=0.3), sample_record(sparsity=0.4)
    path = store.write(one)
    before = path.read_bytes()
    for attempt in (
        lambda: store.write(other),
        lambda: store.write(other, overwrite=True),
        lambda: store.existing(experiment="demo", name="x", decides=decides_of(other)),
    ):
        with pytest.raises(UserError, match=r"another run: sparsity is 0\.3 there, 0\.4 here") as refusal:
            attempt()
        assert "\n" not in str(refusal.value)
    assert path.read_bytes() == before


KILLED_WRITER = """
import os, sys, time
import modegpt.records.store as store
from tests.records.sample import sample_record

def stuck(handle):
    print("writing", flush=True)
    time.sleep(60)

name = sys.argv[2]
setattr(os, name, stuck if name == "fsync" else lambda *_, **__: stuck(0))
store.RecordStore(sys.argv[1]).write(sample_record())
"""


@pytest.mark.parametrize("moment", ["fsync", "link"])
def test_kill_9_in_the_middle_leaves_nothing_partial(tmp_path: Path, repository: Path, moment: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", KILLED_WRITER, str(tmp_path), moment]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert writer.stdout.readline() == "writing\n"
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    store, record = RecordStore(tmp_path), sample_record()
    assert len(list((tmp_path / PARTIAL).iterdir())) == 1  # it was in the middle indeed
    assert store.paths() == [] and len(load_records(tmp_path)) == 0 and store.problems() == []
    assert store.existing(experiment=record["experiment"], name=record["name"], decides=decides_of(record)) is None

    left = next((tmp_path / PARTIAL).iterdir())
    os.utime(left, (time.time() - 2 * STALE_SECONDS,) * 2)
    path = store.write(record)
    assert load_record(path) and files_of(tmp_path) == [str(path.relative_to(tmp_path))]


def _write_after(barrier: Barrier, root: str, number: int) -> None:
    record = sample_record(command=f"writer {number}")
    barrier.wait()
    RecordStore(root).write(record)


def test_concurrent_writers_leave_one_record(tmp_path: Path) -> None:
    barrier = CLEAN.Barrier(3)
    ended_well([CLEAN.Process(target=_write_after, args=(barrier, str(tmp_path), number)) for number in range(3)])
    assert len(files_of(tmp_path)) == 1
    assert load_record(tmp_path / files_of(tmp_path)[0])["command"].startswith("writer ")


def test_without_hard_links_a_record_is_still_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(store_module.os, "link", refuse)
    store = RecordStore(tmp_path)
    path = store.write(sample_record())
    before = path.read_bytes()
    store.write(sample_record(command="again"))
    assert path.read_bytes() == before
    assert len(files_of(tmp_path)) == 1


def test_an_error_is_no_number_and_goes_with_success(tmp_path: Path) -> None:
    store, record = RecordStore(tmp_path), sample_record()
    run = {"experiment": record["experiment"], "name": record["name"], "decides": decides_of(record)}
    hidden = os.sep + os.path.join("srv", "someone", "weights.bin")
    path = store.write_error(
        **run, stage="calibrate", message=f"cannot read {hidden}:\ntoo short", command="modegpt seed=0"
    )
    assert path.name == "error.json"
    (note,) = store.errors()
    assert (note["status"], note["stage"], note["message"]) == (
        "failed",
        "calibrate",
        "cannot read .../weights.bin: too short",
    )
    assert "metrics" not in note and len(load_records(tmp_path)) == 0 and store.existing(**run) is None
    with pytest.raises(UserError):
        load_record(path)
    store.write(record)
    assert store.errors() == [] and not path.exists()


def test_find_goes_by_identity_over_all_experiments(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    path = store.write(sample_record(experiment="other"))
    hash = load_record(path)["identity"]["hash"]
    assert [entry.path for entry in store.find(hash)] == [entry.path for entry in store.find(hash[:10])] == [path]
    assert store.find(hash[:8] + "0" * 56) == store.find("f" * 64) == []


@pytest.mark.parametrize("change", ["metric", "decides", "truncated", "moved"])
def test_tampering_is_found(tmp_path: Path, change: str) -> None:
    store = RecordStore(tmp_path)
    good, path = store.write(sample_record(seed=1)), store.write(sample_record())
    assert store.problems() == []
    record = json.loads(path.read_text())
    if change == "metric":
        record["metrics"]["compressed"]["perplexity"]["ppl_tiny_256"]["value"] -= 1e-9
    elif change == "decides":
        record["identity"]["decides"]["sparsity"] = 0.2
    if change == "moved":
        path.parent.rename(path.parent.with_name("elsewhere"))
    else:
        text = json.dumps(record)
        path.write_text(text[: len(text) // 2] if change == "truncated" else text)
        with pytest.raises(UserError, match=r"record\.json"):
            load_record(path)
        with pytest.warns(UserWarning, match="left out: .*record.json"):
            assert list(load_records(tmp_path)["name"]) == ["tiny-llama modegpt 0.3"]
    (problem,) = store.problems()
    assert str(tmp_path) in problem and str(good) not in problem


def test_unwritable_roots_are_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a directory"):
        RecordStore(tmp_path / "file" / "results").check_writable()
    RecordStore(tmp_path / "new" / "results").check_writable()
    monkeypatch.setattr(store_module.os, "access", lambda *_: False)
    with pytest.raises(UserError, match="no permission"):
        RecordStore(tmp_path / "new" / "results").check_writable()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    with pytest.raises(UserError, match="cannot write"):
        RecordStore(tmp_path / "file" / "results").write(sample_record())


def test_slug() -> None:
    assert slug("Llama 2/7B_a (0.3)") == "Llama-2-7B_a-0.3"
    assert len(slug("x" * 300)) == 80
    with pytest.raises(UserError):
        slug("../..")
