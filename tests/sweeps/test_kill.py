"""Real sweeps of the main job, killed in the middle and launched again: nothing lost, nothing double, nothing partial.

(Without the main job, and on each launcher: tests/cli/test_sweep.py. A record half written:
tests/records/test_store.py. At random, many times: test_soak.py.)
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from modegpt.cli.sweep import LOG
from modegpt.records.store import PARTIAL, RecordStore
from tests.cli.test_sweep import NODE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds processes in /proc"),
]

WORKING = "dense: ppl_jsonl_128"
"""What a job says when its model is loaded and its compression comes next."""
FINISHED = "this run is finished already"
TIMEOUT_SECONDS = 600.0


class Launcher:
    """``launch()`` starts the sweep, the same each time, in a session of its own."""

    def __init__(self, folder: Path, repository: Path, *arguments: str) -> None:
        folder.mkdir(exist_ok=True)
        text = folder / "text.jsonl"
        text.write_text(
            json.dumps({"text": "The old baker walked to the market and bought two apples . " * 200}), encoding="utf-8"
        )
        settings = [
            "calibration=jsonl",
            f"calibration.path={text}",
            "calibration.num_samples=4",
            "calibration.sequence_length=128",
        ]
        settings += [
            "evaluation=jsonl",
            f"evaluation.perplexity.path={text}",
            "evaluation.perplexity.windows=[128]",
            "evaluation.zeroshot=null",
        ]
        settings += ["tracking=disabled", "threads=1", f"output.root={folder / 'results'}"]
        self.command = [sys.executable, "-m", "modegpt", "--multirun", *arguments, *settings]
        self.environment = os.environ | {
            "PYTHONPATH": str(repository),
            "PYTHONUNBUFFERED": "1",
            "MODEGPT_CACHE": str(folder / "cache"),
        }
        self.folder, self.store = folder, RecordStore(folder / "results")
        self.partial = (self.store.root / PARTIAL, folder / "cache" / "partial")

    def launch(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=self.environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def records(self) -> dict[Path, bytes]:
        """Every record there is, whole and where it belongs."""
        paths = self.store.paths() if self.store.root.is_dir() else []
        assert not paths or self.store.problems() == []
        return {path: path.read_bytes() for path in paths}

    def check_complete(self, num_jobs: int, before: dict[Path, bytes]) -> None:
        """``num_jobs`` records, those of ``before`` untouched, and no other file than records and pictures."""
        after = self.records()
        assert len(after) == num_jobs and before.items() <= after.items()
        left = [path for path in self.store.root.rglob("*") if path.is_file()]
        assert {path.name for path in left} == {"record.json", "layers.png", "scores.png"} and len(left) == 3 * num_jobs
        for partial in self.partial:
            assert not any(partial.iterdir())


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> object:
    """What ``condition`` gives at last, while ``process`` lives."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while not (found := condition()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def descendants(pid: int) -> list[int]:
    """The processes below ``pid``."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(FileNotFoundError, ProcessLookupError):
            parents[int(status.parent.name)] = int(status.read_text().partition("\nPPid:\t")[2].split()[0])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def workers(pid: int) -> list[int]:
    """The processes that do jobs for ``pid``, the oldest first."""
    return sorted(child for child in descendants(pid) if b"cli.launcher" in Path(f"/proc/{child}/cmdline").read_bytes())


def stop_between_writes(sweep: Launcher, pid: int) -> None:
    """Stop the process where no file is half written: what a kill leaves of one goes after an hour, and not before."""
    for _ in range(1000):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.05)  # it has stopped by then
        if not any(path for partial in sweep.partial for path in partial.glob("*")):
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.05)
    raise AssertionError("a file is always half written")


def test_killing_the_main_process(tmp_path: Path, repository: Path) -> None:
    sweep = Launcher(tmp_path, repository, "compression.sparsity=0.1,0.2")
    process = sweep.launch()
    working = (line for line in process.stdout if line.startswith(WORKING))
    next(working), next(working)  # the second job is at work
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = sweep.records()
    assert len(before) == 1

    again = sweep.launch()
    output, errors = again.communicate(timeout=TIMEOUT_SECONDS)
    assert again.returncode == 0, errors
    assert output.count(FINISHED) == 1
    sweep.check_complete(2, before)


def test_killing_a_worker(tmp_path: Path, repository: Path) -> None:
    """With all that it started, while its sibling is at work and others wait."""
    sweep = Launcher(tmp_path, repository, *NODE, "compression.sparsity=0.1,0.2,0.3")
    process = sweep.launch()
    logs = f".sweeps/*/*/{LOG}"
    wait_for(lambda: any(WORKING in log.read_text() for log in sweep.store.root.glob(logs)), process)
    victim = workers(process.pid)[0]
    stop_between_writes(sweep, victim)
    for pid in (victim, *descendants(victim)):
        os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1
    *_, failed, last = errors.splitlines()
    assert failed.startswith("failed: job ") and failed.endswith("its process was killed (SIGKILL)")
    assert last.startswith("error: 1 of 3 jobs of the sweep failed; ")
    before = sweep.records()
    assert len(before) == 2

    again = sweep.launch()
    _, errors = again.communicate(timeout=TIMEOUT_SECONDS)
    assert again.returncode == 0, errors
    sweep.check_complete(3, before)
