"""Scores as they become known, kept on disk for the next start of a run that was interrupted."""

import shutil
import time
from typing import Any, Self

from modegpt.cache import Cache

NAME = "begun"
KEEP_SECONDS = 30.0
"""Between two writes: what a killed process loses. An error or Ctrl-C loses nothing."""


class Begun:
    """What is known of one model's scores: JSON values by the names of the parts that they are of.

    Written to ``cache`` now and then, and when its block ends, however it does. None: not kept.
    """

    def __init__(self, cache: Cache | None = None) -> None:
        self.cache = cache
        self.parts: dict[str, Any] = (cache and cache.load_json(NAME)) or {}
        self._kept = time.monotonic()

    def note(self, name: str, value: Any) -> None:
        """``value`` is what is known of the part ``name``. A list may grow after that, with a note each time."""
        self.parts[name] = value
        if time.monotonic() - self._kept >= KEEP_SECONDS:
            self.keep()

    def keep(self) -> None:
        """Write what is known."""
        if self.cache is not None and self.parts:
            self.cache.store_json(NAME, self.parts, replace=True)
        self._kept = time.monotonic()

    def forget(self) -> None:
        """Remove it from the disk: all is scored and lies elsewhere."""
        if self.cache is not None:
            shutil.rmtree(self.cache.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.keep()
