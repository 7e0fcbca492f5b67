"""Files appear whole or not at all; the hash of a JSON value depends on all of it and on nothing else."""

import os
import time
from pathlib import Path

import pytest

from modegpt.errors import UserError
from modegpt.files import (
    STALE_SECONDS,
    canonical_json,
    json_sha256,
    partial_file,
    publish,
    read_json,
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
