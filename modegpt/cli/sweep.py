"""What ``--multirun`` adds to Hydra's launchers: no job stops another, and the last lines say which failed.

Every job leaves ``outcome.json`` in its directory of the sweep, whichever launcher ran it and in whichever process; the
main process knows the planned jobs, so a job whose process was killed is missed. A job that raised counts as returned
for Hydra, because a raised error would stop the sweep after its batch (``hydra.sweeper.max_batch_size``).
"""

import json
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from modegpt.cli.messages import explain
from modegpt.files import write_text
from modegpt.progress import Progress, duration

OUTCOME = "outcome.json"
POLL_SECONDS = 0.5
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


def attempt(job: Callable[[], object], *, number: int, overrides: list[str], directory: Path) -> None:
    """Run one job of a sweep and note its outcome in ``directory``; an error is noted, not raised."""
    outcome: dict[str, Any] = {"number": number, "overrides": overrides, "error": None}
    try:
        if Sweep.current is not None:
            Sweep.current.announce(number)
        job()
    except Exception as error:
        outcome |= {"error": explain(error), "traceback": traceback.format_exc()}
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / OUTCOME, json.dumps(outcome, indent=2))


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
        """Forget outcomes of an earlier sweep in the same directory, and show progress of other processes' jobs."""
        for number in range(len(self.jobs)):
            self._outcome(number).unlink(missing_ok=True)
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
        """One line for each job that failed or left no outcome."""
        errors = {number: self._error(number) for number in range(len(self.jobs))}
        return [
            f"job {number} ({' '.join(self.jobs[number]) or 'defaults'}): {error}"
            for number, error in errors.items()
            if error
        ]

    def _outcome(self, number: int) -> Path:
        return self.directory / str(number) / OUTCOME

    def _error(self, number: int) -> str | None:
        if not self._outcome(number).exists():
            return "left no outcome: its process was killed, never started or still runs"
        return json.loads(self._outcome(number).read_text(encoding="utf-8"))["error"]

    def _watch(self) -> None:
        with self.progress.bar(len(self.jobs), "sweep", unit="job") as bar:
            finished = False
            while not finished:
                finished = self._done.wait(POLL_SECONDS)
                if new := sum(self._outcome(number).exists() for number in range(len(self.jobs))) - bar.n:
                    bar.update(new)


class SweepCallback(Callback):
    """Tells this process about the sweep Hydra is about to launch (configured in ``conf/config.yaml``)."""

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        """Plan exactly the jobs that Hydra's own sweeper will make of the command line."""
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parameters = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
        overrides = parser.parse_overrides([*parameters, *config.hydra.overrides.task])
        [jobs] = BasicSweeper.split_arguments(overrides, None)
        Sweep.current = Sweep(
            directory=Path(config.hydra.sweep.dir),
            jobs=jobs,
            progress=Progress(quiet=bool(config.quiet)),
            in_process=config.hydra.launcher._target_ == BASIC_LAUNCHER,
        )
        Sweep.current.start()
