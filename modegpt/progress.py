"""Progress with time left: bars on a terminal, a line now and then in a log, or nothing at all."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

LOG_SECONDS = 30.0
"""Between two lines of one loop where standard error is not a terminal; a shorter loop writes none."""


@dataclass
class LogLines:
    """Stands in for a bar where bars would flood a log: the same counting, a line every ``LOG_SECONDS``."""

    total: int | None
    description: str
    unit: str
    n: int = 0
    # taken now: what runs inside the loop may redirect standard error
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    _start: float = field(default_factory=lambda: time.monotonic())
    _next: float = field(default_factory=lambda: time.monotonic() + LOG_SECONDS)

    def update(self, n: int = 1) -> None:
        """Count ``n`` more."""
        self.n += n
        now = time.monotonic()
        if now >= self._next and self.n:
            self._next = now + LOG_SECONDS
            left = (
                f"/{self.total} {self.unit}s, {duration((self.total - self.n) * (now - self._start) / self.n)} left"
                if self.total
                else f" {self.unit}s"
            )
            print(f"{self.description}: {self.n}{left}", file=self.stream, flush=True)

    def __enter__(self) -> "LogLines":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class Progress:
    """Where long loops report, on standard error; silence when ``quiet``."""

    quiet: bool = False

    def track(
        self, items: Iterable[Item], description: str, total: int | None = None, unit: str = "it"
    ) -> Iterator[Item]:
        """Yield ``items`` and report the time left."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        with self.bar(total, description, unit) as bar:
            for item in items:
                yield item
                bar.update()

    def bar(self, total: int | None, description: str, unit: str = "it") -> Any:
        """Something to ``update`` by hand, with ``n`` and ``total``; a context manager."""
        if not self.quiet and not sys.stderr.isatty():
            return LogLines(total, description, unit)
        return tqdm(total=total, desc=description, unit=unit, disable=self.quiet, leave=False, dynamic_ncols=True)

    def say(self, line: str) -> None:
        """Print one line without tearing a bar."""
        if not self.quiet:
            tqdm.write(line)


def duration(seconds: float) -> str:
    """``seconds`` for a reader: "40 s", "12 min", "3 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
