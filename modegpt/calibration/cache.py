"""Statistics on disk, so that one calibration serves a sweep.

Content-addressed: the folder's name is the hash of everything that decides the statistics (weights,
tokens, precision, batch size); one file per layer and statistic, written atomically, with its checksum
inside, so concurrent workers can share it and a damaged file is recomputed, with a warning, not used.
Without locks: a file or folder may go at any moment, because another worker renames or evicts it.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modegpt.calibration.statistics import Statistics

HEADER_BYTES = 256
"""About what a file holds beside its tensor."""
STALE_SECONDS = 3600.0
"""A file being written lives for seconds; an older one lost its writer."""


def statistics_key(**decides: str | int) -> str:
    """Hash of what decides a calibration's statistics: weights and token fingerprints, dtype, precision, batch size."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class StatisticsCache:
    """The statistics of one (model, tokens) pair below ``root/statistics/key``.

    ``max_bytes`` bounds the whole of ``root/statistics``: before a store the least recently used
    other calibrations go; what still does not fit is not kept. Concurrent workers may exceed it by what
    they are just writing.
    """

    root: Path
    key: str
    max_bytes: int

    @property
    def directory(self) -> Path:
        return self.root / "statistics" / self.key

    def _path(self, index: int, name: str) -> Path:
        return self.directory / f"layer{index:03d}.{name}.safetensors"

    def load(self, index: int, names: frozenset[str], *, device: torch.device | str = "cpu") -> Statistics:
        """Those of the statistics ``names`` of layer ``index`` that are here and intact."""
        try:
            os.utime(self.directory)
        except FileNotFoundError:
            return {}
        found = {name: self._read(index, name) for name in names}
        return {name: value.to(device) for name, value in found.items() if value is not None}

    def store(self, index: int, statistics: Statistics) -> None:
        """Keep a layer's statistics as far as they fit; files that are there already stay."""
        for name, value in statistics.items():
            path = self._path(index, name)
            value = value.cpu().contiguous()
            if path.exists() or not self._make_room(value.nbytes + HEADER_BYTES):
                continue
            temporary = self._written(value)
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, path)
            except (
                FileNotFoundError,
                FileExistsError,
            ):  # another worker needed the room and evicts this calibration right now
                temporary.unlink(missing_ok=True)

    def _written(self, value: Tensor) -> Path:
        """``value`` as a complete file where nobody looks or evicts, on the same file system."""
        partial = self.root / "partial"
        partial.mkdir(parents=True, exist_ok=True)
        for left in _entries(partial):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                Path(left).unlink(missing_ok=True)
        handle, temporary = tempfile.mkstemp(dir=partial)
        os.close(handle)
        save_file({"value": value}, temporary, metadata={"sha256": _checksum(value)})
        return Path(temporary)

    def _read(self, index: int, name: str) -> Tensor | None:
        path = self._path(index, name)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                value, checksum = file.get_tensor("value"), file.metadata()["sha256"]
        except (
            SafetensorError,
            OSError,
            RuntimeError,
        ):  # what a file that cannot be opened raises depends on the version
            if not path.exists():
                return None
            checksum = None
        if checksum is None or checksum != _checksum(value):
            warnings.warn(f"cached statistics {path} are damaged; computing them again", stacklevel=2)
            path.unlink(missing_ok=True)
            return None
        return value

    def _make_room(self, needed_bytes: int) -> bool:
        """Evict other calibrations, least recently used first, until ``needed_bytes`` fit."""
        folders = sorted(_entries(self.directory.parent), key=_age)
        sizes = {Path(folder): sum(file.stat().st_size for file in _entries(folder)) for folder in folders}
        excess = sum(sizes.values()) + needed_bytes - self.max_bytes
        for folder, size in sizes.items():
            if excess > 0 and folder != self.directory:
                shutil.rmtree(folder, ignore_errors=True)
                excess -= size
        return excess <= 0


def _entries(folder: Path | os.DirEntry[str]) -> Iterator[os.DirEntry[str]]:
    """What is in ``folder`` and stays long enough to be looked at."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):
                entry.stat()  # which the entry remembers
                yield entry


def _age(entry: os.DirEntry[str]) -> float:
    return entry.stat().st_mtime


def _checksum(value: Tensor) -> str:
    return hashlib.sha256(value.numpy().tobytes()).hexdigest()
