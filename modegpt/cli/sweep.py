"""What ``--multirun`` adds to Hydra's launchers: no job stops another, and the last lines say which failed.

Every job leaves ``outcome.json`` in its directory of the sweep, whichever launcher ran it and in whichever process; the
main process knows the planned jobs, so a job without an outcome is missed. A job that raised counts as returned
for Hydra, because a raised error would stop the sweep after its batch (``hydra.sweeper.max_batch_size``).
"""

import json
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from modegpt.cli.messages import explain
from modegpt.files import hold, remove_abandoned, write_text
from modegpt.progress import Progress, duration

OUTCOME, LOG = "outcome.json", "log.txt"
FOLDER = ".sweeps"
"""Of nothing but directories of sweeps."""
SUBMITTED = ".submitit"
"""What a scheduler's jobs need, those too that wait in its queue and are no process yet."""
POLL_SECONDS = 0.5


def attempt(job: Callable[[], object], *, number: int, overrides: list[str], directory: Path) -> None:
    """Run one job of a sweep and note its outcome in ``directory``; an error is noted, an interruption raised too."""
    outcome: dict[str, Any] = {"number": number, "overrides": overrides, "error": None}
    try:
        if Sweep.current is not None:
            Sweep.current.announce(number)
        job()
    except (Exception, KeyboardInterrupt) as error:
        outcome |= {"error": explain(error), "traceback": traceback.format_exc()}
        if isinstance(error, KeyboardInterrupt):
            raise
    finally:
        _note(outcome, directory)


def _note(outcome: dict[str, Any], directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / OUTCOME, json.dumps(outcome, indent=2))
    except OSError as error:  # a full disk must not stop the other jobs
        print(f"error: cannot write {directory / OUTCOME}: {error.strerror}", file=sys.stderr)
        if outcome["error"]:
            print(f"error: {outcome['error']}", file=sys.stderr)


@dataclass
class Sweep:
    """The sweep that this process leads: its planned jobs and their outcomes on disk."""

    current: ClassVar["Sweep | None"] = None

    directory: Path
    jobs: list[list[str]]
    progress: Progress
    in_process: bool
    _announced: list[float] = field(default_factory=list)
    _done: threading.Event = field(default_factory=threading.Event)
    _watcher: threading.Thread | None = None

    def start(self) -> None:
        """Clear what earlier sweeps left, here and in directories of theirs, and show progress of other processes."""
        if self.directory.parent.name == FOLDER:  # and not a place that the user chose
            others = [path for path in self.directory.parent.glob("*") if path != self.directory]
            remove_abandoned(path for path in others if not (path / SUBMITTED).exists())
        with suppress(OSError):  # which Hydra is about to say
            self.directory.mkdir(parents=True, exist_ok=True)
            hold(self.directory)
        for outcome in self._outcomes():
            outcome.unlink(missing_ok=True)
        if not self.in_process:
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()

    def announce(self, number: int) -> None:
        """Say which job starts now and the time left, where jobs run one after the other in this process."""
        finished, now = len(self._announced), time.monotonic()
        self._announced.append(now)
        left = (
            f", {duration((now - self._announced[0]) / finished * (len(self.jobs) - number))} left" if finished else ""
        )
        self.progress.say(f"[{number + 1}/{len(self.jobs)}{left}] {' '.join(self.jobs[number]) or 'defaults'}")

    def conclude(self, number: int, *, killed_by: str | None) -> None:
        """Note that the job's process was killed, if it was before the job had an outcome, and show what it printed."""
        overrides = " ".join(self.jobs[number]) or "defaults"
        if killed_by is not None and not self._outcome(number).exists():
            error = f"its process was killed ({killed_by})"
            _note({"number": number, "overrides": self.jobs[number], "error": error}, self._outcome(number).parent)
        with suppress(OSError):
            log = (self._outcome(number).parent / LOG).read_text(encoding="utf-8", errors="replace")
            if log:
                Progress().say(f"[job {number}] {overrides}\n{log.rstrip()}")

    def stop(self) -> None:
        """Stop watching."""
        self._done.set()
        if self._watcher is not None:
            self._watcher.join()

    def discard(self) -> None:
        """Remove the sweep's working files."""
        shutil.rmtree(self.directory, ignore_errors=True)
        if self.directory.parent.is_dir() and not any(self.directory.parent.iterdir()):
            self.directory.parent.rmdir()

    def failures(self) -> list[str]:
        """One line for each job that failed."""
        outcomes = [json.loads(path.read_text(encoding="utf-8")) for path in self._outcomes() if path.exists()]
        return [
            f"job {outcome['number']} ({' '.join(outcome['overrides']) or 'defaults'}): {outcome['error']}"
            for outcome in outcomes
            if outcome["error"]
        ]

    def unfinished(self) -> int:
        """How many jobs have no outcome: lost with their process, still at work in another, or never begun."""
        return sum(not path.exists() for path in self._outcomes())

    def _outcomes(self) -> list[Path]:
        return [self._outcome(number) for number in range(len(self.jobs))]

    def _outcome(self, number: int) -> Path:
        return self.directory / str(number) / OUTCOME

    def _watch(self) -> None:
        with self.progress.bar(len(self.jobs), "sweep", unit="job") as bar:
            finished = False
            while not finished:
                finished = self._done.wait(POLL_SECONDS)
                if new := sum(path.exists() for path in self._outcomes()) - bar.n:
                    bar.update(new)
