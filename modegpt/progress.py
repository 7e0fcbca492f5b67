"""Progress with time left: bars on a terminal, a line now and then in a log, or nothing at all."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

LOG_SECONDS = 30.0
"""Between two lines of one loop where standard error is not a terminal; a shorter loop writes none."""


DENSE, SCORINGS = "dense", ("dense", "compressed", "recovered")
"""The labels under which a run scores a model; every scoring takes about as long as that of the dense one."""


@dataclass
class Course:
    """A whole run: ``order`` are the stages known before the start, ``seconds`` what each stage has taken so far.

    Stages that are not in ``order`` are the loops of a method, which come after the dense model's scoring.
    """

    order: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, seconds: float) -> None:
        """Count what a loop of ``stage`` took."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def left(self, stage: str, *, elapsed: float, left: float) -> float | None:
        """Seconds left of the run, where a loop of ``stage`` runs since ``elapsed`` and has ``left``.

        None until two other stages are known, the dense model's scoring one of them, and where anything but a scoring
        is ahead. Another loop of the method may still come.
        """
        known = self.seconds.keys() - {stage}
        if DENSE not in known or len(known) < 2:
            return None
        ahead = self.order[1 + max(index for index, each in enumerate(self.order) if each in {stage, *known}) :]
        if any(each not in SCORINGS for each in ahead):
            return None
        if stage in SCORINGS:
            left = max(left, self.seconds[DENSE] - self.seconds.get(stage, 0.0) - elapsed)
        return left + len(ahead) * self.seconds[DENSE]


@dataclass
class Pace:
    """How fast one loop goes, and with it the run. ``done`` is called with its seconds."""

    left_of_run: Callable[[float, float], float | None]
    done: Callable[[float], None]
    start: float = field(default_factory=lambda: time.monotonic())

    @property
    def elapsed(self) -> float:
        """Seconds since the loop began."""
        return time.monotonic() - self.start

    def left(self, n: int, total: int) -> float:
        """Seconds left of the loop after ``n`` of ``total``."""
        return (total - n) * self.elapsed / n

    def run(self, n: int, total: int | None) -> str:
        """The time left of the run in words; empty where it is not known."""
        seconds = self.left_of_run(self.elapsed, self.left(n, total)) if n and total else None
        return "" if seconds is None else f"run: {duration(seconds)} left"

    def finish(self) -> None:
        """Say what the loop took."""
        self.done(self.elapsed)


@dataclass
class LogLines:
    """Stands in for a bar where bars would flood a log: the same counting, a line every ``LOG_SECONDS``."""

    total: int | None
    description: str
    unit: str
    pace: Pace
    n: int = 0
    # taken now: what runs inside the loop may redirect standard error
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    _next: float = field(default_factory=lambda: time.monotonic() + LOG_SECONDS)

    def update(self, n: int = 1) -> None:
        """Count ``n`` more."""
        self.n += n
        now = time.monotonic()
        if now >= self._next and self.n:
            self._next = now + LOG_SECONDS
            left = (
                f"/{self.total} {self.unit}s, {duration(self.pace.left(self.n, self.total))} left"
                if self.total
                else f" {self.unit}s"
            )
            run = self.pace.run(self.n, self.total)
            print(f"{self.description}: {self.n}{left}{run and f'; {run}'}", file=self.stream, flush=True)

    def __enter__(self) -> "LogLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.pace.finish()


class Bar(tqdm):
    """A bar on a terminal that also shows the time left of the run."""

    def __init__(self, pace: Pace, **options: Any) -> None:
        self.pace = pace
        super().__init__(**options)

    def update(self, n: float | None = 1) -> bool | None:
        """Count ``n`` more."""
        if not self.disable and (run := self.pace.run(int(self.n + (n or 0)), int(self.total or 0))):
            self.set_postfix_str(run, refresh=False)
        return super().update(n)

    def __exit__(self, *error: Any) -> None:
        self.pace.finish()
        super().__exit__(*error)


@dataclass(frozen=True)
class Progress:
    """Where long loops report, on standard error; silence when ``quiet``.

    ``label`` says what the loops work on, such as the dense model; ``course`` is the run that they are part of.
    """

    quiet: bool = False
    label: str | None = None
    course: Course = field(default_factory=Course)

    def of(self, label: str) -> "Progress":
        """The same, for loops on what ``label`` names."""
        return replace(self, label=label)

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
        stage = self.label or description
        pace = Pace(
            lambda elapsed, left: self.course.left(stage, elapsed=elapsed, left=left),
            lambda seconds: self.course.add(stage, seconds),
        )
        if self.label is not None:
            description = f"{self.label}: {description}"
        if not self.quiet and not sys.stderr.isatty():
            return LogLines(total, description, unit, pace)
        return Bar(pace, total=total, desc=description, unit=unit, disable=self.quiet, leave=False, dynamic_ncols=True)

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


@contextmanager
def errors_only(loggers: Iterable[str]) -> Iterator[None]:
    """Drop what the libraries' ``loggers`` say below an error."""
    levels = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
