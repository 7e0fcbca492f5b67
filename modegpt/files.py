"""Files that appear whole or not at all, and the hash of a JSON value."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from modegpt.errors import UserError

STALE_SECONDS = 3600.0
"""A partial file is written in seconds; an older one lost its writer."""
LARGEST_BYTES = 2**30
"""Of a JSON file or an archive of records; whole experiments take less than a thousandth of it."""
NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


def canonical_json(value: Any) -> str:
    """The one JSON text of ``value``: sorted keys, no spaces.

    Raises ValueError for NaN and inf, TypeError for what JSON cannot hold.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def json_sha256(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError naming it when it cannot be read."""
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except RecursionError:
        raise UserError(f"cannot read {path}: it is nested too deeply") from None


def read_bytes(path: Path) -> bytes:
    """The content of a small file. Raises OSError, also for what could be read for ever: a pipe, a device, or more than
    ``LARGEST_BYTES``.
    """
    found = path.stat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    if found.st_size > LARGEST_BYTES:
        raise OSError(errno.EFBIG, f"it has {found.st_size} bytes, more than such a file can have", str(path))
    return path.read_bytes()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in the block, which then takes the place of ``path``.

    It is synced first, and a kill or an error leaves what was there. For one writer at a time: its next attempt
    overwrites what a killed one left.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all; one writer at a time."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def partial_file(folder: Path) -> Iterator[Path]:
    """A new file in ``folder``, for the block to write and move away; it is gone at the end.

    For many writers at a time: each has a name of its own, and every one removes what killed ones left in ``folder``,
    which is made for this alone and must be on the file system of the file's final place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    handle, name = tempfile.mkstemp(dir=folder)
    os.fchmod(handle, 0o644)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    for left in folder.iterdir():
        with suppress(FileNotFoundError):  # its own writer, or another sweeper, was faster
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                left.unlink()


@contextmanager
def partial_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder ``<prefix>...`` in ``parent``, for the block to fill and move away; it is gone at the end.

    Those of the same prefix whose process was killed go first.
    """
    remove_abandoned(parent.glob(f"{prefix}*"))
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        handle = hold(folder)
        if folder.exists():  # nobody took it for abandoned before it was held
            break
        os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def hold(folder: Path) -> int:
    """Say that this process needs ``folder``, until the handle returned is closed or the process ends, however it does.

    Several processes may. Where the file system has no locks, `remove_abandoned` removes nothing.
    """
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return handle


def remove_abandoned(folders: Iterable[Path]) -> None:
    """Remove the ``folders`` that no living process holds."""
    for folder in folders:
        with suppress(OSError):  # held, or removed by another process
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(handle)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name. Raises FileExistsError if the name is taken, whoever took it."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        # no hard links here: still whole or absent, but of two writers within a microsecond the last would win
        if path.exists():
            raise FileExistsError(errno.EEXIST, "exists", str(path)) from error
        os.replace(temporary, path)


def sync(path: Path) -> None:
    """Bring a file, or the entries of a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
