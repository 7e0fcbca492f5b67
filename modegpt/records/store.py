"""The store: one directory a run, one write-once ``record.json`` in it, until it is packed into an archive.

``<root>/<experiment>/<slug of the name>-<first 8 of the identity>/record.json``; a run that failed leaves
``error.json`` there instead, which holds no number and disappears when the run succeeds. Files appear whole or not at
all: they are written and synced under ``<root>/.partial`` and then linked to their place, which fails if the place is
taken, so concurrent writers need no lock and a kill at any moment leaves either nothing or everything.

``<root>/<experiment>.jsonl.gz`` holds the records that were packed (`modegpt.records.packing`). To a reader, records in
directories and in archives are one store.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from modegpt.errors import UserError
from modegpt.files import canonical_json, json_sha256, partial_file, publish, read_bytes, sync
from modegpt.records.archive import SUFFIX, Archive
from modegpt.records.paths import portable
from modegpt.records.schema import (
    FAILED,
    FINISHED,
    SCHEMA_VERSION,
    Record,
    differences,
    json_problems,
    migrated,
    validate,
)

Found = TypeVar("Found")

RECORD, ERROR, PARTIAL = "record.json", "error.json", ".partial"
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What reading JSON of another form raises."""


def canonical(value: Any) -> str:
    """The one JSON text of ``value``, see ``canonical_json``. Raises UserError for NaN and what JSON cannot hold."""
    for problem in json_problems(value):
        raise UserError(problem)
    return canonical_json(value)


def identity(decides: Mapping[str, Any]) -> str:
    """The run's identity: SHA-256 (hex) of the canonical JSON of everything that decides its result."""
    return hashlib.sha256(canonical(dict(decides)).encode()).hexdigest()


def content_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of a record without the field that stores this hash.

    Raises ValueError for a number that is not finite.
    """
    return json_sha256({key: value for key, value in record.items() if key != "content_sha256"})


def slug(text: str) -> str:
    """``text`` as one directory name of letters, digits, dots, dashes and underscores."""
    name = re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:80].rstrip("-.")
    if not name:
        raise UserError(f"{text!r} cannot name a directory: it has no letter or digit")
    return name


def load_record(path: Path) -> Record:
    """Read one record, check it as it was written, and return it in the present schema version.

    ``path``: a ``record.json``, or a record in an archive (``results/methods.jsonl.gz#ce337fed``).

    Raises:
        UserError: unreadable, not a record, or changed since it was written; names the file and the key.
    """
    return Entry.at(path).load()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise a UserError that names the record where the block stumbles over its form."""
    try:
        yield
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(f"{path}: not of a record's form ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Entry:
    """One record of a store: where it is, and the directory of its run, where pictures and checkpoints lie."""

    path: Path
    directory: Path
    packed: Record | None = None
    """What the archive says, if the record is in one."""

    @classmethod
    def at(cls, path: Path) -> "Entry":
        """The entry at a path as `load_record` takes it. Raises UserError where an archive holds no such record."""
        file, _, digits = path.name.partition("#")
        if not file.endswith(SUFFIX):
            return cls(path, path.parent)
        archive = Archive.read(path.with_name(file))
        found = archive.matching(digits)
        if len(found) != 1:
            raise UserError(f"{archive.path}: {len(found)} records begin with {digits!r}, name one")
        return cls.of(archive, found[0])

    @classmethod
    def of(cls, archive: Archive, record: Record) -> "Entry":
        """The entry of one of the archive's records."""
        directory = archive.path.with_name(archive.path.name.removesuffix(SUFFIX))
        return cls(archive.reference(record), directory / _folder(record["name"], record["identity"]["hash"]), record)

    def stored(self) -> Any:
        """The record as it was written, unchecked."""
        return _read(self.path) if self.packed is None else self.packed

    @property
    def content(self) -> str:
        """The hash of its content, as stored."""
        return str(self.stored()["content_sha256"])

    def may_replace(self, packed: "Entry") -> bool:
        """Whether a record in a directory may take the place of one in the archive.

        It may if the content is the same, or if a run with ``output.overwrite=true`` put the other aside here.
        """
        here = [self, *map(Entry.at, self.directory.glob("superseded-*.json"))]
        return packed.content in [entry.content for entry in here]

    def load(self) -> Record:
        """The record, checked; see `load_record`."""
        with explained(self.path):
            return self._load()

    def _load(self) -> Record:
        stored, where = self.stored(), str(self.path)
        if not isinstance(stored, dict):
            raise UserError(f"{where}: a record is a JSON object, this is a {type(stored).__name__}")
        if "content_sha256" not in stored:
            raise UserError(f"{where}: content_sha256 is missing: this is not the record of a finished run")
        try:
            hash = content_hash(stored)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        if stored["content_sha256"] != hash:
            raise UserError(
                f"{where}: content_sha256 does not match the content: the record was changed after it was written"
            )
        record = migrated(stored, where)
        validate(record, where)
        if record["identity"]["hash"] != identity(record["identity"]["decides"]):
            raise UserError(f"{where}: identity.hash is not the hash of identity.decides: the record was made by hand")
        return record


class RecordStore:
    """All records under one root directory, which need not exist yet.

    A record is in its run's folder or in its experiment's archive; every reader sees both as one. Where both have one
    of the same run, the folder's counts: it is the newer one.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def directory(self, *, experiment: str, name: str, hash: str) -> Path:
        """Where the run with this identity lives; whatever else it leaves belongs there too."""
        return self.root / slug(experiment) / _folder(name, hash)

    def home(self, record: Record) -> Path:
        """The `directory` of the run that a record is of."""
        return self.directory(experiment=record["experiment"], name=record["name"], hash=record["identity"]["hash"])

    def check_writable(self) -> None:
        """Raise UserError if records cannot be created under the root. Creates nothing: meant for before any work."""
        place = self.root.absolute()
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise UserError(f"cannot write records under {self.root}: {place} is not a directory")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"cannot write records under {self.root}: no permission to write in {place}")

    def existing(self, *, experiment: str, name: str, decides: Mapping[str, Any]) -> Record | None:
        """The finished record of the run that ``decides`` describes, or None if it is still to be done.

        Raises:
            UserError: the place is taken by a record with another identity, or by a broken one.
        """
        hash = identity(decides)
        path = self.directory(experiment=experiment, name=name, hash=hash) / RECORD
        if path.exists():
            record = load_record(path)
            _refuse_other(path, record["identity"]["decides"], decides)
            return record
        packed = self.packed(experiment, hash)
        return None if packed is None else packed.load()

    def place(self, record: Record) -> Path:
        """Where this record of the store is, as `load_record` takes it."""
        path = self.home(record) / RECORD
        packed = None if path.exists() else self.packed(record["experiment"], record["identity"]["hash"])
        return packed.path if packed else path

    def write(self, record: Mapping[str, Any], *, overwrite: bool = False) -> Path:
        """Put a finished run's record on disk, once, and return its path.

        ``schema_version``, ``status``, ``identity.hash`` and ``content_sha256`` are filled in here. If the same run has
        a record already, that one stays (the first of several concurrent writers wins), unless ``overwrite``: then the
        new one takes its place and the previous one stays beside it as ``superseded-<n>.json``. A record that is in an
        archive only is copied to its directory first, so the same holds for it.

        Raises:
            UserError: not a valid record, the place is taken by another run's record, or no permission.
        """
        decides = record["identity"]["decides"]
        hash = identity(decides)
        completed = {"schema_version": SCHEMA_VERSION, **record, "status": FINISHED}
        completed["identity"] = {"hash": hash, **record["identity"]}
        assert completed["identity"]["hash"] == hash, "identity.hash was made from something else"
        place = self.home(completed)
        for problem in json_problems(completed):
            raise UserError(f"record for {place}: {problem}")
        completed["content_sha256"] = content_hash(completed)
        validate(completed, f"record for {place}")

        path = place / RECORD
        packed = None if path.exists() else self.packed(record["experiment"], hash)
        try:
            place.mkdir(parents=True, exist_ok=True)
            if packed:
                with self.written(packed.stored()) as temporary, suppress(FileExistsError):
                    publish(temporary, path)
            with self.written(completed) as temporary:
                try:
                    publish(temporary, path)
                except FileExistsError:
                    _refuse_other(path, load_record(path)["identity"]["decides"], decides)
                    if overwrite:
                        _keep_previous(path)
                        os.replace(temporary, path)
            sync(place)
            (place / ERROR).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        return path

    def write_error(
        self, *, experiment: str, name: str, decides: Mapping[str, Any], stage: str, message: str, command: str
    ) -> Path:
        """Note that a run failed: at which ``stage`` and why (one line), and how to run it again.

        A later failure of the same run replaces the note; a success removes it.
        """
        hash = identity(decides)
        note = {
            "schema_version": SCHEMA_VERSION,
            "status": FAILED,
            "identity": {"hash": hash, "decides": dict(decides)},
            "name": name,
            "experiment": experiment,
            "created": timestamp(),
            "command": command,
            "stage": stage,
            "message": portable(" ".join(message.split())),
        }
        path = self.directory(experiment=experiment, name=name, hash=hash) / ERROR
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self.written(note) as temporary:
                os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        return path

    def records(self, experiment: str | None = None) -> Iterator[tuple[Path, Record]]:
        """Every record, or those of one experiment, with its path; checked, and sorted by directory.

        Raises UserError if the root is not a directory, or for a record that is broken or was changed.
        """
        return ((entry.path, entry.load()) for entry in self.entries(experiment))

    def survey(
        self, read: Callable[[Path, Record], Found], experiment: str | None = None
    ) -> tuple[list[Found], list[str]]:
        """What ``read`` makes of every record, as `records` has them, and a line for each that is left out.

        A record that is broken, was changed or has another form stops no other.
        Raises UserError if the root is not a directory.
        """
        found: list[Found] = []
        left_out: list[str] = []
        for name in self.experiments() if experiment is None else [slug(experiment)]:
            entries, problems = self._readable(name)
            left_out += problems
            for entry in entries:
                try:
                    with explained(entry.path):
                        found.append(read(entry.path, entry.load()))
                except UserError as error:
                    left_out.append(str(error))
        return found, left_out

    def _readable(self, experiment: str) -> tuple[list[Entry], list[str]]:
        """The entries of an experiment by directory, without the lines of its archive that are none."""
        try:
            archive = self.archive(experiment)
        except UserError as error:
            return list(self.entries_loose(experiment)), [str(error)]
        packed: list[Entry] = []
        problems: list[str] = []
        for line in archive.lines_read():
            if isinstance(line, UserError):
                problems.append(str(line))
            else:
                packed.append(Entry.of(archive, line))
        found = {entry.directory: entry for entry in (*packed, *self.entries_loose(experiment))}
        return [found[directory] for directory in sorted(found)], problems

    def paths(self) -> list[Path]:
        """The paths of `records`."""
        return [entry.path for entry in self.entries()]

    def entries(self, experiment: str | None = None) -> Iterator[Entry]:
        """The records as `records` has them, unchecked."""
        for name in self.experiments() if experiment is None else [slug(experiment)]:
            found = {entry.directory: entry for entry in (*self.entries_packed(name), *self.entries_loose(name))}
            yield from (found[directory] for directory in sorted(found))

    def entries_loose(self, experiment: str) -> Iterator[Entry]:
        """The records that are in folders."""
        return map(Entry.at, sorted((self.root / experiment).glob(f"*/{RECORD}")))

    def entries_packed(self, experiment: str) -> Iterator[Entry]:
        """The records that are in the experiment's archive."""
        archive = self.archive(experiment)
        return (Entry.of(archive, record) for record in archive.records())

    def experiments(self) -> list[str]:
        """The names of all directories and archives under the root. Raises UserError if the root is no directory."""
        if not self.root.is_dir():
            raise UserError(f"no records at {self.root}: not a directory")
        archives = (path.name.removesuffix(SUFFIX) for path in self.root.glob(f"*{SUFFIX}"))
        directories = (path.name for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))
        return sorted({*archives, *directories})

    def archive(self, experiment: str) -> Archive:
        """The experiment's archive; an empty one where there is no file."""
        return Archive.read(self.root / f"{experiment}{SUFFIX}")

    def packed(self, experiment: str, hash: str) -> Entry | None:
        """The record in the experiment's archive with this identity, if any."""
        archive = self.archive(slug(experiment))
        return next((Entry.of(archive, record) for record in archive.matching(hash)), None)

    def errors(self) -> list[Record]:
        """The notes of runs that failed and have no record since; of one that is damaged, where it is."""
        paths = [path for path in sorted(self.root.glob(f"*/*/{ERROR}")) if not path.with_name(RECORD).exists()]
        return [note for note in map(_note, paths) if not self._succeeded(note)]

    def _succeeded(self, note: Record) -> bool:
        try:
            return bool(note["identity"] and self.packed(note["experiment"], note["identity"]["hash"]))
        except UserError:
            return False  # the archive is damaged, which `survey` says

    def find(self, digits: str) -> list[Entry]:
        """The records whose identity begins with ``digits``, in whichever experiment they are."""
        loose = [Entry.at(path) for path in sorted(self.root.glob(f"*/*-{digits[:8]}*/{RECORD}"))]
        found = [entry for entry in loose if entry.load()["identity"]["hash"].startswith(digits)]
        for path in sorted(self.root.glob(f"*{SUFFIX}")):
            archive = Archive.read(path)
            packed = (Entry.of(archive, record) for record in archive.matching(digits))
            found += [entry for entry in packed if not (entry.directory / RECORD).exists()]
        return found

    def problems(self) -> list[str]:
        """What is wrong with the store, one line each: broken or changed records, records in another's place."""
        return [problem for name in self.experiments() for problem in self._problems(name)]

    def _problems(self, experiment: str) -> Iterator[str]:
        packed: dict[str, Entry] = {}
        try:
            packed |= {entry.stored()["identity"]["hash"]: entry for entry in self.entries_packed(experiment)}
        except UserError as error:
            yield str(error)
        for entry in (*packed.values(), *self.entries_loose(experiment)):
            try:
                record = entry.load()
                with explained(entry.path):
                    home, other = self.home(record), packed.get(record["identity"]["hash"], entry)
                    replaces = entry.may_replace(other)
            except UserError as error:
                yield str(error)
                continue
            if entry.directory != home:
                yield f"{entry.path}: belongs {'in the archive of' if entry.packed else 'at'} {home}"
            if not replaces:
                yield f"{entry.path}: {other.path} is the same run with another content: delete one of them"

    @contextmanager
    def written(self, content: Mapping[str, Any]) -> Iterator[Path]:
        """``content`` as a complete, synced file that nobody looks at yet, to be given its name in the block."""
        with partial_file(self.root / PARTIAL) as temporary:
            text = json.dumps(content, indent=2, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")
            sync(temporary)
            yield temporary


def timestamp() -> str:
    """The present moment in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(path: Path) -> Any:
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def _note(path: Path) -> Record:
    """The note of a failed run at ``path``, or one in its place that says that it is damaged."""
    try:
        note = _read(path)
    except UserError:
        note = None
    match note:
        case {
            "experiment": str(),
            "name": str(),
            "stage": str(),
            "message": str(),
            "identity": {"hash": str(), "decides": dict()},
        }:
            return dict(note)
    directory = path.parent
    place = {"experiment": directory.parent.name, "name": directory.name, "identity": None}
    return place | {"stage": "an unknown stage", "message": f"{path} is damaged"}


def _folder(name: str, hash: str) -> str:
    """The last part of a run's directory."""
    return f"{slug(name)}-{hash[:8]}"


def _keep_previous(path: Path) -> None:
    number = 1
    while True:
        try:
            return publish(path, path.with_name(f"superseded-{number}.json"))
        except FileExistsError:
            number += 1


def _refuse_other(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if identity(found) == identity(wanted):
        return
    shown = [f"{key} is {there!r} there, {here!r} here" for key, (there, here) in differences(found, wanted).items()]
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    raise UserError(f"{path} is the record of another run: {'; '.join(shown[:3])}{more}; choose another name or output")
