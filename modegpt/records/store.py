"""The store: one directory a run, one write-once ``record.json`` in it.

``<root>/<experiment>/<slug of the name>-<first 8 of the identity>/record.json``; a run that failed leaves
``error.json`` there instead, which holds no number and disappears when the run succeeds. Files appear whole or not at
all: they are written and synced under ``<root>/.partial`` and then linked to their place, which fails if the place is
taken, so concurrent writers need no lock and a kill at any moment leaves either nothing or everything.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modegpt.errors import UserError
from modegpt.files import canonical_json, partial_file, publish, sync
from modegpt.records.paths import portable
from modegpt.records.schema import FAILED, FINISHED, SCHEMA_VERSION, differences, json_problems, validate

RECORD, ERROR, PARTIAL = "record.json", "error.json", ".partial"


def canonical(value: Any) -> str:
    """The one JSON text of ``value``, see ``canonical_json``. Raises UserError for NaN and what JSON cannot hold."""
    for problem in json_problems(value):
        raise UserError(problem)
    return canonical_json(value)


def identity(decides: Mapping[str, Any]) -> str:
    """The run's identity: SHA-256 (hex) of the canonical JSON of everything that decides its result."""
    return hashlib.sha256(canonical(dict(decides)).encode()).hexdigest()


def content_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of a record without the field that stores this hash."""
    return identity({key: value for key, value in record.items() if key != "content_sha256"})


def slug(text: str) -> str:
    """``text`` as one directory name of letters, digits, dots, dashes and underscores."""
    name = re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:80].rstrip("-.")
    if not name:
        raise UserError(f"{text!r} cannot name a directory: it has no letter or digit")
    return name


def load_record(path: Path) -> dict:
    """Read one record and check it: schema, finite numbers, identity, and that no byte of its content was changed.

    Raises:
        UserError: unreadable, not a record, or changed since it was written; names the file and the key.
    """
    record = _read(path)
    validate(record, str(path))
    if record["identity"]["hash"] != identity(record["identity"]["decides"]):
        raise UserError(f"{path}: identity.hash is not the hash of identity.decides: the record was changed by hand")
    if record["content_sha256"] != content_hash(record):
        raise UserError(
            f"{path}: content_sha256 does not match the content: the record was changed after it was written"
        )
    return record


class RecordStore:
    """All records under one root directory, which need not exist yet."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def directory(self, *, experiment: str, name: str, hash: str) -> Path:
        """Where the run with this identity lives; whatever else it leaves belongs there too."""
        return self.root / slug(experiment) / f"{slug(name)}-{hash[:8]}"

    def check_writable(self) -> None:
        """Raise UserError if records cannot be created under the root. Creates nothing: meant for before any work."""
        place = self.root.absolute()
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise UserError(f"cannot write records under {self.root}: {place} is not a directory")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"cannot write records under {self.root}: no permission to write in {place}")

    def existing(self, *, experiment: str, name: str, decides: Mapping[str, Any]) -> dict | None:
        """The finished record of the run that ``decides`` describes, or None if it is still to be done.

        Raises:
            UserError: the place is taken by a record with another identity, or by a broken one.
        """
        path = self.directory(experiment=experiment, name=name, hash=identity(decides)) / RECORD
        if not path.exists():
            return None
        record = load_record(path)
        _refuse_other(path, record["identity"]["decides"], decides)
        return record

    def write(self, record: Mapping[str, Any], *, overwrite: bool = False) -> Path:
        """Put a finished run's record on disk, once, and return its path.

        ``schema_version``, ``status``, ``identity.hash`` and ``content_sha256`` are filled in here. If the same run has
        a record already, that one stays (the first of several concurrent writers wins), unless ``overwrite``: then the
        new one takes its place and the previous one stays beside it as ``superseded-<n>.json``.

        Raises:
            UserError: not a valid record, the place is taken by another run's record, or no permission.
        """
        decides = record["identity"]["decides"]
        completed = {"schema_version": SCHEMA_VERSION, **record, "status": FINISHED}
        completed["identity"] = {"hash": identity(decides), **record["identity"]}
        assert completed["identity"]["hash"] == identity(decides), "identity.hash was made from something else"
        place = self.directory(experiment=record["experiment"], name=record["name"], hash=identity(decides))
        problems = list(json_problems(completed))
        completed["content_sha256"] = "" if problems else content_hash(completed)
        validate(completed, f"record for {place}")

        path = place / RECORD
        try:
            place.mkdir(parents=True, exist_ok=True)
            with self._written(completed) as temporary:
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
            with self._written(note) as temporary:
                os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        return path

    def paths(self) -> list[Path]:
        """Every ``record.json`` of the store, sorted. Raises UserError if the root is not a directory."""
        if not self.root.is_dir():
            raise UserError(f"no records at {self.root}: not a directory")
        return sorted(self.root.glob(f"*/*/{RECORD}"))

    def errors(self) -> list[dict]:
        """The notes of runs that failed and have no record since."""
        notes = sorted(self.root.glob(f"*/*/{ERROR}"))
        return [_read(path) for path in notes if not path.with_name(RECORD).exists()]

    def find(self, hash: str) -> Path | None:
        """The record with this identity (or a prefix of at least 8 digits), in whichever experiment it is."""
        assert len(hash) >= 8
        candidates = sorted(self.root.glob(f"*/*-{hash[:8]}/{RECORD}"))
        return next((path for path in candidates if load_record(path)["identity"]["hash"].startswith(hash)), None)

    def problems(self) -> list[str]:
        """What is wrong with the store, one line each: broken or changed records, records in another's place."""
        found = []
        for path in self.paths():
            try:
                record = load_record(path)
            except UserError as error:
                found.append(str(error))
                continue
            place = self.directory(
                experiment=record["experiment"], name=record["name"], hash=record["identity"]["hash"]
            )
            if path.parent != place:
                found.append(f"{path}: belongs at {place / RECORD}")
        return found

    @contextmanager
    def _written(self, content: Mapping[str, Any]) -> Iterator[Path]:
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
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


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
