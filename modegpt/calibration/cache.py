"""Statistics on disk, so that one calibration serves a sweep.

Content-addressed: the folder's name is the hash of everything that decides the statistics (weights,
tokens, precision, batch size); one file per layer and statistic, written atomically, with its checksum
inside, so concurrent workers can share it and a damaged file is recomputed, with a warning, not used.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modegpt.calibration.statistics import Statistics


HEADER_BYTES = 256
"""About what a file holds beside its tensor."""


def statistics_key(**decides: str | int) -> str:
    """Hash of what decides a calibration's statistics: weights and token fingerprints, dtype, precision, batch size."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class StatisticsCache:
    """The statistics of one (model, tokens) pair below ``root/statistics/key``.

    ``max_bytes`` bounds the whole of ``root/statistics``: before a store the least recently used
    other calibrations go; what still does not fit is not kept.
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
        if not self.directory.exists():
            return {}
        os.utime(self.directory)
        found = {name: self._read(index, name) for name in names}
        return {name: value.to(device) for name, value in found.items() if value is not None}

    def store(self, index: int, statistics: Statistics) -> None:
        """Keep a layer's statistics as far as they fit; files that are there already stay."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for name, value in statistics.items():
            path = self._path(index, name)
            value = value.cpu().contiguous()
            if path.exists() or not self._make_room(value.nbytes + HEADER_BYTES):
                continue
            handle, temporary = tempfile.mkstemp(dir=self.directory, prefix=".partial-")
            os.close(handle)
            save_file({"value": value}, temporary, metadata={"sha256": _checksum(value)})
            os.replace(temporary, path)

    def _read(self, index: int, name: str) -> Tensor | None:
        path = self._path(index, name)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                value, checksum = file.get_tensor("value"), file.metadata()["sha256"]
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError):
            checksum = None
        if checksum is None or checksum != _checksum(value):
            warnings.warn(f"cached statistics {path} are damaged; computing them again", stacklevel=2)
            path.unlink(missing_ok=True)
            return None
        return value

    def _make_room(self, needed_bytes: int) -> bool:
        """Evict other calibrations, least recently used first, until ``needed_bytes`` fit."""
        folders = sorted((folder for folder in self.directory.parent.iterdir() if folder.is_dir()), key=lambda folder: folder.stat().st_mtime)
        sizes = {folder: _folder_bytes(folder) for folder in folders}
        excess = sum(sizes.values()) + needed_bytes - self.max_bytes
        for folder in folders:
            if excess > 0 and folder != self.directory:
                shutil.rmtree(folder, ignore_errors=True)
                excess -= sizes[folder]
        return excess <= 0


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _checksum(value: Tensor) -> str:
    return hashlib.sha256(value.numpy().tobytes()).hexdigest()

