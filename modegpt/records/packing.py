"""Between directories and archives: `pack` moves finished records into the file that git holds, `unpack` back.

A kill at any moment leaves every record whole in at least one of the two: the new place is written, synced and read
back before anything of the old one goes. Of a run's directory only ``record.json`` goes, and the directory itself if
that was all. Pictures, a saved model, a note of an error and superseded records stay where they are.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modegpt.errors import UserError
from modegpt.files import partial_file, publish, sync
from modegpt.records.archive import Archive, archived
from modegpt.records.schema import Record
from modegpt.records.store import PARTIAL, RECORD, Entry, RecordStore


def pack(store: RecordStore, experiment: str) -> int:
    """Move the records in the experiment's directories into its archive; returns how many there were to move.

    What the archive holds already stays in it. A record of the same run with another content is refused, unless a run
    with ``output.overwrite=true`` put the archived one aside: then it takes its place. Meant for an experiment of which
    no job runs, because a job draws its pictures after it has written its record.

    Raises:
        UserError: a record is broken, in another's place or contradicts the archive (then nothing has changed), or a
            file cannot be written.
    """
    with _alone(store.root):
        if experiment not in store.experiments():
            raise UserError(f"no records of {experiment!r} under {store.root}: neither a directory nor an archive")
        packed, loose = _by_identity(store.entries_packed(experiment)), _by_identity(store.entries_loose(experiment))
        before = {hash: entry.stored() for hash, entry in packed.items()}
        after = dict(before)
        for hash, entry in loose.items():
            if entry.directory != (place := store.home(entry.stored())):
                raise UserError(f"{entry.path}: belongs at {place}")
            if hash not in packed or entry.content != packed[hash].content:
                after[hash] = entry.stored()
            if hash in packed and not entry.may_replace(packed[hash]):
                raise UserError(f"{entry.path} and {packed[hash].path} are one run with two contents: delete one")
        if after != before:
            _write(store, store.archive(experiment).path, after)
        for hash, entry in loose.items():
            if entry.content == after[hash]["content_sha256"]:  # else it was overwritten a moment ago
                entry.path.unlink()
            _remove_if_empty(entry.directory)
        _remove_if_empty(store.root / experiment)
        return len(loose)


def unpack(store: RecordStore, experiment: str) -> int:
    """Write the archive's records back into their directories and remove the archive; returns how many it held.

    The files are those that were packed, byte for byte.

    Raises:
        UserError: the archive is broken, or contradicts a record in a directory (then nothing has changed), or a file
            cannot be written.
    """
    with _alone(store.root):
        packed = _by_identity(store.entries_packed(experiment)).values()
        if not packed:
            raise UserError(f"no archive of {experiment!r} under {store.root}: nothing to unpack")
        targets = {entry.directory / RECORD: entry for entry in packed}
        for path, entry in targets.items():
            if path.exists() and not Entry.at(path).may_replace(entry):
                raise UserError(f"{path} and {entry.path} are one run with two contents: delete one")
        for path, entry in targets.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with store.written(entry.stored()) as temporary, suppress(FileExistsError):
                publish(temporary, path)
            sync(path.parent)
            Entry.at(path).load()
        store.archive(experiment).path.unlink()
        sync(store.root)
        return len(targets)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One packer at a time in a store; the lock goes with the process that holds it."""
    try:
        handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"no records at {root}: not a directory") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    except OSError as error:
        raise UserError(f"cannot write {error.filename or root}: {error.strerror}") from error
    finally:
        os.close(handle)


def _by_identity(entries: Iterator[Entry]) -> dict[str, Entry]:
    """The entries, each checked. Raises UserError for a broken one, and for an identity that is there twice."""
    found: dict[str, Entry] = {}
    for entry in entries:
        hash = entry.load()["identity"]["hash"]
        if hash in found:
            raise UserError(f"{entry.path} and {found[hash].path} are one run under two names: delete one")
        found[hash] = entry
    return found


def _write(store: RecordStore, path: Path, records: dict[str, Record]) -> None:
    with partial_file(store.root / PARTIAL) as temporary:
        temporary.write_bytes(archived(records.values()))
        sync(temporary)
        if list(Archive.read(temporary).records()) != [records[hash] for hash in sorted(records)]:
            raise UserError(f"{path}: what was written cannot be read back; nothing has changed")
        os.replace(temporary, path)
    sync(store.root)


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):  # it holds more than a record
        directory.rmdir()
