"""What is computed once and kept on disk for later runs.

Content-addressed: a folder is named by the hash of everything that decides what is in it. Every file is written
atomically and carries a checksum over its identity and its content, so concurrent workers share a cache without locks,
and what is damaged or in another's place is computed again, with a warning. Any file or folder may disappear at any
moment, because another worker evicts it.
"""

import functools
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from modegpt.files import json_sha256, partial_file, read_bytes

if TYPE_CHECKING:  # who keeps no tensors need not wait for PyTorch
    import torch
    from torch import Tensor

FORMAT = 2
"""Of the files. Folders of another format are never read; they are evicted as those of any other key."""
OVERHEAD_BYTES = 256
"""About what a file holds beside its value."""
DAMAGES = (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError)
"""What reading a damaged file raises; for safetensors it depends on the version."""


def cache_directory(configured: str | None = None) -> Path:
    """``configured``, else ``$MODEGPT_CACHE``, else ``~/.cache/modegpt``."""
    return Path(configured or os.environ.get("MODEGPT_CACHE") or Path.home() / ".cache" / "modegpt")


@dataclass(frozen=True)
class Cache:
    """The values under one ``key``, each a file in ``root/objects/key``.

    Args:
        key: the hash of everything that decides the values, see ``files.json_sha256``.
        max_bytes: bounds the whole of ``root/objects``. Before a value is stored, the least recently used other
            keys are evicted; a value that still does not fit is not kept. Concurrent workers may exceed the bound by
            what they are writing.
    """

    root: Path
    key: str
    max_bytes: int

    @property
    def directory(self) -> Path:
        """Where the values of this key are."""
        return self.root / "objects" / f"{self.key}-{FORMAT}"

    def load_tensor(self, name: str, *, device: "torch.device | str" = "cpu") -> "Tensor | None":
        """The tensor stored under ``name``; None if there is none, or a damaged one."""
        value = self._load(f"{name}.safetensors", lambda path: self._read_tensor(name, path))
        return None if value is None else value.to(device)

    def store_tensor(self, name: str, value: "Tensor") -> None:
        """Keep ``value``, unless there is one already or it does not fit."""
        from safetensors.torch import save_file

        value = value.cpu().contiguous()

        def write(path: Path) -> None:
            save_file({"value": value}, path, metadata={"sha256": self._sealed(name, _described(value))})

        self._store(f"{name}.safetensors", value.nbytes + OVERHEAD_BYTES, write)

    def load_json(self, name: str) -> Any | None:
        """The JSON value stored under ``name``; None if there is none, or a damaged one."""
        return self._load(f"{name}.json", lambda path: self._read_json(name, path))

    def store_json(self, name: str, value: Any, *, replace: bool = False) -> None:
        """Keep ``value``, unless it does not fit or there is one already, which only ``replace`` replaces."""
        text = json.dumps({"sha256": self._sealed(name, value), "value": value}, indent=1)
        self._store(f"{name}.json", len(text), lambda path: path.write_text(text, encoding="utf-8"), replace=replace)

    def _sealed(self, name: str, content: Any) -> str:
        """The checksum of ``content`` (JSON) under ``name`` of this key: it holds nowhere else."""
        return json_sha256({"key": self.key, "name": name, "content": content})

    def _read_tensor(self, name: str, path: Path) -> "Tensor":
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > 16 * OVERHEAD_BYTES:  # before the file is mapped, however large it claims to be
            raise ValueError(f"its header would have {header_bytes} bytes")
        with safe_open(path, framework="pt") as file:
            checksum, value = (file.metadata() or {}).get("sha256"), file.get_tensor("value")
        self._check(checksum, name, _described(value))
        return value

    def _read_json(self, name: str, path: Path) -> Any:
        stored = json.loads(read_bytes(path))
        self._check(stored["sha256"], name, stored["value"])
        return stored["value"]

    def _check(self, checksum: str | None, name: str, content: Any) -> None:
        if checksum is None:
            raise ValueError("it has no checksum")
        if checksum != self._sealed(name, content):
            raise ValueError("its checksum is that of another content or place")

    def _load(self, file_name: str, read: Callable[[Path], Any]) -> Any | None:
        path = self.directory / file_name
        with suppress(OSError):  # a cache that cannot be written can be read
            os.utime(self.directory)
        if not os.path.exists(path):
            return None
        try:
            if not path.is_file():
                raise ValueError("it is no file")
            return read(path)
        except DAMAGES as error:
            if not os.path.exists(path):
                return None
            reason = str(error) or type(error).__name__
        warnings.warn(f"{path} is damaged ({reason}); its content is computed anew", stacklevel=3)
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return None

    def _store(self, file_name: str, num_bytes: int, write: Callable[[Path], object], *, replace: bool = False) -> None:
        path = self.directory / file_name
        if (path.exists() and not replace) or not self._make_room(num_bytes):
            return
        try:
            with partial_file(self.root / "partial") as temporary:
                write(temporary)
                self.directory.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, path)
        except (FileNotFoundError, FileExistsError):
            return  # another worker needs the room and evicts this key right now
        except OSError as error:
            _say_unwritable(self.root, error.strerror)

    def _make_room(self, needed_bytes: int) -> bool:
        """Evict other keys, least recently used first, until ``needed_bytes`` fit; none where they never would."""
        if needed_bytes > self.max_bytes:
            return False
        folders = sorted(_entries(self.directory.parent), key=lambda entry: entry.stat().st_mtime)
        sizes = {Path(folder): sum(file.stat().st_size for file in _entries(folder)) for folder in folders}
        excess = sum(sizes.values()) + needed_bytes - self.max_bytes
        for folder, size in sizes.items():
            if excess > 0 and folder != self.directory:
                shutil.rmtree(folder, ignore_errors=True)
                excess -= size
        return excess <= 0


@functools.cache  # once, whatever is not kept
def _say_unwritable(root: Path, reason: str) -> None:
    warnings.warn(f"results are not kept for reuse: cannot write {root}: {reason}", stacklevel=4)


def _described(value: "Tensor") -> dict[str, Any]:
    """What tells a tensor (on the CPU) from every other."""
    import torch

    content = hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    return {"dtype": str(value.dtype), "shape": list(value.shape), "sha256": content}


def _entries(folder: Path | os.DirEntry[str]) -> Iterator[os.DirEntry[str]]:
    """What is in ``folder`` and stays long enough to be looked at."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):
                entry.stat()  # which the entry remembers
                yield entry
