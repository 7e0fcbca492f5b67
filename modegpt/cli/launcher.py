"""What Hydra gets of us for a sweep: the plan, and a launcher for one machine on which no job concerns another."""

import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from modegpt.cli.sweep import LOG, Sweep
from modegpt.errors import UserError
from modegpt.files import hold
from modegpt.progress import Progress
from modegpt.termination import EXIT_CODE, GRACE_SECONDS

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
WORK = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the sweep passes it on
from modegpt.cli.launcher import work
work(int(sys.argv[1]))
"""


class ProcessLauncher(Launcher):
    """At most ``n_jobs`` worker processes (null: one a job), each of which does one job after the other.

    A worker that is killed costs the job that it did: the others go on, and another worker takes its place. What a job
    prints goes to a file of its own and is shown when the job ends. Ctrl-C and SIGTERM end all workers.
    """

    __module__ = "hydra_plugins.modegpt"  # Hydra takes no launcher from elsewhere

    def __init__(self, n_jobs: int | None = None) -> None:
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra once a sweep. Raises UserError, which Hydra would dress up if ``__init__`` did."""
        if self.n_jobs is not None and (type(self.n_jobs) is not int or self.n_jobs < 1):
            raise UserError(
                f"hydra.launcher.n_jobs={self.n_jobs} must be a whole number, 1 or more, or null: one a job"
            )
        self.hydra_context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Do one batch; every job has an outcome when it returns."""
        sweep = Sweep.current
        assert sweep is not None
        waiting = deque(
            self._composed(overrides, number) for number, overrides in enumerate(job_overrides, initial_job_idx)
        )
        idle: list[Worker] = []
        busy: dict[Connection, Worker] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < (self.n_jobs or len(job_overrides)):
                    idle = [worker for worker in idle if worker.process.poll() is None]
                    worker = idle.pop() if idle else Worker(self.task, sweep.directory)
                    busy[worker.connection] = worker
                    worker.start(waiting.popleft())
                ready = wait(list(busy))
                for connection in [each for each in busy if each in ready]:
                    worker = busy.pop(connection)
                    if worker.returned():
                        idle.append(worker)
                    sweep.conclude(worker.number, killed_by=worker.end)
        finally:
            stop([*idle, *busy.values()])
        return [JobReturn(status=JobStatus.COMPLETED) for _ in job_overrides]

    def _composed(self, overrides: Sequence[str], number: int) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
        return config


PROCESS_LAUNCHER = f"{ProcessLauncher.__module__}.{ProcessLauncher.__name__}"


def register() -> None:
    """Let Hydra find the launcher under that name. The package ``hydra_plugins`` is there if another plugin is."""
    sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    sys.modules[ProcessLauncher.__module__] = sys.modules[__name__]
    Plugins.instance().register(ProcessLauncher)


class Worker:
    """One process, the ``number`` of the job that it does or did last, and how it came to its ``end``, if it did."""

    def __init__(self, task: TaskFunction, sweep: Path) -> None:
        ours, its = socket.socketpair()
        with its:
            command = [sys.executable, "-c", WORK, str(its.fileno())]
            # no process of multiprocessing's, which would have this one complain of what a killed worker leaves
            self.process = subprocess.Popen(command, pass_fds=[its.fileno()])
        self.connection: Connection = Connection(ours.detach())
        self.number = 0
        self.end: str | None = None
        self._send((task, sweep))

    def start(self, config: DictConfig) -> None:
        """Give it a job."""
        self.number = config.hydra.job.num
        self._send(config)

    def _send(self, value: object) -> None:
        with suppress(OSError):  # killed a moment ago: `returned` finds out
            self.connection.send(value)

    def returned(self) -> bool:
        """Whether it is there for another job; waits until that is known."""
        try:
            self.connection.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            self.end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return False
        return True


def stop(workers: Sequence[Worker]) -> None:
    """End idle and busy workers; those that do not heed SIGTERM are killed."""
    for worker in workers:
        worker.connection.close()
        worker.process.terminate()
    for worker in workers:
        try:
            worker.process.wait(0.8 * GRACE_SECONDS)  # after which it ended itself
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


def work(handle: int) -> None:
    """What a worker does: the jobs that come through the socket ``handle``, until it closes or a signal ends one."""
    connection: Connection = Connection(handle)
    task, sweep = connection.recv()
    sweep.mkdir(parents=True, exist_ok=True)
    hold(sweep)
    try:
        while True:
            config: DictConfig = connection.recv()
            _do(config, task, sweep / str(config.hydra.job.num))
            connection.send(None)
    except EOFError:
        pass
    except KeyboardInterrupt:
        sys.exit(EXIT_CODE)


def _do(config: DictConfig, task: TaskFunction, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    log = os.open(directory / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    os.close(log)
    setup_globals()
    HydraConfig.instance().set_config(config)
    run_job(
        hydra_context=HydraContext(config_loader=cast(Any, None), callbacks=Callbacks(config)),  # composed already
        task_function=task,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


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
        if config.hydra.launcher._target_ == PROCESS_LAUNCHER:  # else it would be in what is sent to a cluster
            register()
        Sweep.current.start()
