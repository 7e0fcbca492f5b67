"""Real sweeps of the main job, killed in the middle and launched again: nothing lost, nothing double, nothing partial.

(Joblib's workers, without the main job: tests/cli/test_sweep.py. A record half written: tests/records/test_store.py.)
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modegpt.records.store import PARTIAL, RecordStore

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
        left = [path for path in self.store.root.rglob("*") if path.is_file() and ".sweeps" not in path.parts]
        assert {path.name for path in left} == {"record.json", "layers.png", "scores.png"} and len(left) == 3 * num_jobs
        for partial in (self.store.root / PARTIAL, self.folder / "cache" / "partial"):
            assert not any(partial.iterdir())


def wait_for(condition: Callable[[], object]) -> object:
    end = time.monotonic() + TIMEOUT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def children(pid: int) -> Iterator[int]:
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"\nPPid:\t{pid}\n" in status.read_text():
                yield int(status.parent.name)
        except (FileNotFoundError, ProcessLookupError):
            continue


def test_killing_the_main_process(tmp_path: Path, repository: Path) -> None:
    sweep = Launcher(tmp_path, repository, "compression.sparsity=0.1,0.2,0.3,0.4")
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
    sweep.check_complete(4, before)


def test_killing_a_worker_of_submitit(tmp_path: Path, repository: Path) -> None:
    sweep = Launcher(tmp_path, repository, "hydra/launcher=node", "compression.sparsity=0.1,0.2")
    process = sweep.launch()

    def logs(said: str) -> list[Path]:
        return [
            log
            for log in sweep.store.root.glob(".sweeps/*/.submitit/*/*_log.out")
            if said in log.read_text(encoding="utf-8")
        ]

    log = wait_for(lambda: logs(WORKING))[0]
    [worker] = children(int(log.parent.name))  # submitit calls a job by the process that watches over its worker
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1
    assert "left no outcome" in errors and errors.splitlines()[-1].startswith("error: 1 of 2 jobs of the sweep failed")
    before = sweep.records()
    assert len(before) == 1

    again = sweep.launch()
    _, errors = again.communicate(timeout=TIMEOUT_SECONDS)
    assert again.returncode == 0, errors
    sweep.check_complete(2, before)
