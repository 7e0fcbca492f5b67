"""One experiment's finished records in one file that git can hold: ``<experiment>.jsonl.gz``.

A line is one record as JSON without spaces, its keys in the order in which they were recorded (tables list tasks in
that order). The lines are sorted by identity, and nothing else is in the file, no name and no time: the same records
make the same bytes, and one of them is found by halving. A record in an archive is called
``<experiment>.jsonl.gz#<first digits of its identity>``.
"""

import gzip
import io
import json
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path

from modegpt.errors import UserError
from modegpt.files import read_bytes
from modegpt.records.schema import Record

SUFFIX = ".jsonl.gz"
NUM_DIGITS = 12
"""Of an identity, in a reference: among a million records two share their first twelve with a chance of 1 in 500."""


@dataclass(frozen=True)
class Archive:
    """The lines of the archive ``path``, none where there is no such file. No record of them is checked yet."""

    path: Path
    lines: list[bytes]

    @classmethod
    def read(cls, path: Path) -> "Archive":
        """Raises UserError for a file that is not a whole archive."""
        try:
            text = gzip.decompress(read_bytes(path))
        except (FileNotFoundError, NotADirectoryError):
            return cls(path, [])
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: not a whole archive: {error}") from error
        return cls(path, text.splitlines())

    def records(self) -> Iterator[Record]:
        """Every record. Raises UserError for a line that is none, and where an identity is not above the one before."""
        for record in self.lines_read():
            if isinstance(record, UserError):
                raise record
            yield record

    def lines_read(self) -> Iterator[Record | UserError]:
        """Of every line the record, or why it is none or does not belong there."""
        previous = ""
        for number in range(len(self.lines)):
            try:
                record = self._record(number)
            except UserError as error:
                yield error
                continue
            if (hash := record["identity"]["hash"]) <= previous:
                yield UserError(
                    f"{self.path}: line {number + 1} is not sorted by identity: the file was changed by hand"
                )
                continue
            yield record
            previous = hash

    def matching(self, digits: str) -> list[Record]:
        """The records whose identity begins with ``digits``."""
        first = bisect_left(range(len(self.lines)), digits, key=self._hash)
        later = map(self._record, range(first, len(self.lines)))
        return list(takewhile(lambda record: record["identity"]["hash"].startswith(digits), later))

    def reference(self, record: Record) -> Path:
        """What a record of this archive is called."""
        return self.path.with_name(f"{self.path.name}#{record['identity']['hash'][:NUM_DIGITS]}")

    def _hash(self, number: int) -> str:
        return str(self._record(number)["identity"]["hash"])

    def _record(self, number: int) -> Record:
        try:
            record: Record = json.loads(self.lines[number])
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: line {number + 1} is not JSON: {error}") from error
        match record:
            case {"identity": {"hash": str()}, "name": str()}:
                return record
        raise UserError(f"{self.path}: line {number + 1} is not a record")


def archived(records: Iterable[Record]) -> bytes:
    """The archive of ``records``, which may come in any order; no two of them share an identity."""
    lines = sorted((record["identity"]["hash"], _line(record)) for record in records)
    assert all(one[0] < other[0] for one, other in pairwise(lines)), "an identity is there twice"
    content = io.BytesIO()
    # not gzip.compress, whose header differs between versions of Python
    with gzip.GzipFile(filename="", mode="wb", fileobj=content, compresslevel=9, mtime=0) as file:
        file.writelines(line for _, line in lines)
    return content.getvalue()


def _line(record: Record) -> bytes:
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode() + b"\n"
