"""Files appear whole or not at all; the hash of a JSON value depends on all of it and on nothing else."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modegpt.errors import UserError
from modegpt.files import (
    STALE_SECONDS,
    canonical_json,
    hold,
    json_sha256,
    partial_file,
    partial_folder,
    publish,
    read_json,
    remove_abandoned,
    replacing,
    write_text,
)


def test_the_hash_ignores_order_and_sees_every_value() -> None:
    assert json_sha256({"a": 1, "b": [1, 2.5]}) == json_sha256({"b": (1, 2.5), "a": 1})
    values = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": True}, {"a": None}, {"a": [1]}, [], "", 0]
    assert len({json_sha256(value) for value in values}) == len(values)
    assert canonical_json({"b": "é", "a": [1, None]}) == '{"a":[1,null],"b":"é"}'
    assert json_sha256({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_sha256([float("nan")])


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old", "nothing is seen before the end"
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"
    write_text(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and path.read_text() == "new"


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as temporary:
        name = temporary.name
        temporary.write_text("1")
    (tmp_path / name).write_text("left by a killed writer")
    write_text(tmp_path / "file", "2")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_partial_files_have_names_of_their_own_and_go(tmp_path: Path) -> None:
    folder = tmp_path / "partial"
    with partial_file(folder) as one, partial_file(folder) as other:
        assert one != other and one.stat().st_mode & 0o777 == 0o644
        os.replace(other, tmp_path / "moved")
    assert not list(folder.iterdir()) and (tmp_path / "moved").exists()


def test_stale_partial_files_are_removed_and_young_ones_stay(tmp_path: Path) -> None:
    young, old = tmp_path / "young", tmp_path / "old"
    for left in (young, old):
        left.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * STALE_SECONDS,) * 2)
    with partial_file(tmp_path):
        assert young.exists() and not old.exists()


@pytest.mark.parametrize("links", [True, False])
def test_a_published_name_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for text in ("first", "second"):
        (tmp_path / text).write_text(text)
    publish(tmp_path / "first", tmp_path / "name")
    with pytest.raises(FileExistsError):
        publish(tmp_path / "second", tmp_path / "name")
    assert (tmp_path / "name").read_text() == "first"


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    for name in ("x.json", "missing.json"):
        with pytest.raises(UserError, match=name):
            read_json(tmp_path / name)


SAVING = """
import sys
from pathlib import Path
from modegpt.files import partial_folder

with partial_folder(Path(sys.argv[1]), ".model.partial-") as folder:
    (folder / "weights").write_text("half")
    print("at work", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_was_making_is_cleared_by_the_next(tmp_path: Path, repository: Path) -> None:
    """And not what a living one is making, nor anything of another name."""
    (tmp_path / ".model.old").mkdir()
    command = [sys.executable, "-c", SAVING, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "at work\n"
        [its] = tmp_path.glob(".model.partial-*")
        with partial_folder(tmp_path, ".model.partial-") as mine:
            assert {path.name for path in tmp_path.iterdir()} == {".model.old", its.name, mine.name}
            assert (its / "weights").read_text() == "half"
        process.kill()
        process.wait()
    assert {path.name for path in tmp_path.iterdir()} == {".model.old", its.name}
    with partial_folder(tmp_path, ".model.partial-") as mine:
        assert {path.name for path in tmp_path.iterdir()} == {".model.old", mine.name}
    assert {path.name for path in tmp_path.iterdir()} == {".model.old"}


def test_a_folder_that_was_moved_away_is_not_removed(tmp_path: Path) -> None:
    with partial_folder(tmp_path, ".part-") as folder:
        (folder / "file").write_text("whole")
        folder.rename(tmp_path / "place")
    assert (tmp_path / "place" / "file").read_text() == "whole"


def test_several_may_hold_a_folder(tmp_path: Path) -> None:
    (folder := tmp_path / "folder").mkdir()
    first, second = hold(folder), hold(folder)
    os.close(first)
    remove_abandoned([folder, tmp_path / "gone"])
    assert folder.exists()
    os.close(second)
    remove_abandoned([folder])
    assert not folder.exists()
