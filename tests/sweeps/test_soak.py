"""Sweeps killed at random, whole process trees, on each launcher: they record what an undisturbed sweep does.

``MODEGPT_SOAK_KILLS`` says how often (54), ``MODEGPT_SOAK_SEED`` when.
"""

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from modegpt.models.checkpoints import saved_by
from modegpt.models.integrity import check_files
from tests.cli.test_sweep import LAUNCHERS
from tests.sweeps.test_kill import TIMEOUT_SECONDS, Launcher, descendants, workers

pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds processes in /proc"),
]

NUM_KILLS = int(os.environ.get("MODEGPT_SOAK_KILLS", "54"))
SEED = int(os.environ.get("MODEGPT_SOAK_SEED", "0"))
JOBS = ("compression.sparsity=0.1,0.3", "allocation=uniform,entropic", "output.save_model=auto")
NUM_JOBS = 4
COMPARED = ("name", "seeds", "model", "calibration", "compression", "metrics")


def results_of(sweep: Launcher) -> dict[str, Any]:
    """What each record says but for times and places, by identity; each checkpoint is whole and of its run."""
    found = {}
    for path in sweep.records():
        record = json.loads(path.read_text(encoding="utf-8"))
        found[record["identity"]["hash"]] = {
            key: record[key] for key in ("name", "metrics", "compression", "calibration")
        }
    for checkpoint in sweep.store.root.glob("*/*/model"):
        check_files(checkpoint)
        run = saved_by(checkpoint)
        assert run is not None and checkpoint.parent.name.endswith(run[:8])
    return found


def complete(sweep: Launcher) -> float:
    """Run the sweep to its end; returns the seconds that took."""
    start = time.monotonic()
    process = sweep.launch()
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, errors
    return time.monotonic() - start


def kill_at_random(sweep: Launcher, generator: random.Random, seconds: float) -> bool:
    """Launch the sweep and kill it, or one of its workers, within ``seconds``; False if it was finished by then."""
    process = sweep.launch()
    time.sleep(generator.uniform(0, seconds))
    if process.poll() is not None:
        return False
    below = workers(process.pid)
    root = generator.choice([process.pid, process.pid, *below])
    for pid in (root, *descendants(root)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_SECONDS)  # with a worker killed, the others go on
    assert process.returncode in ((-signal.SIGKILL,) if root == process.pid else (0, 1))
    return True


@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_what_survives_is_what_an_undisturbed_sweep_records(
    launcher: tuple[str, ...], tmp_path: Path, repository: Path
) -> None:
    generator = random.Random(f"{SEED} {launcher}")
    undisturbed = Launcher(tmp_path / "undisturbed", repository, *launcher, *JOBS)
    seconds = complete(undisturbed)
    expected = results_of(undisturbed)
    assert len(expected) == NUM_JOBS

    sweep = Launcher(tmp_path / "killed", repository, *launcher, *JOBS)
    kills = finished = 0
    while kills < NUM_KILLS / len(LAUNCHERS):
        kills += kill_at_random(sweep, generator, seconds)
        found = results_of(sweep)
        assert found.items() <= expected.items()
        if len(found) == NUM_JOBS:
            complete(sweep)  # which clears what the last kill left, and finds nothing to do
            check_clean(sweep)
            for folder in (sweep.store.root, sweep.folder / "cache"):
                shutil.rmtree(folder)
            finished += 1
    complete(sweep)
    assert results_of(sweep) == expected
    check_clean(sweep)
    print(f"{kills} kills, {finished + 1} sweeps, all {NUM_JOBS} records of each as undisturbed")


def check_clean(sweep: Launcher) -> None:
    """Nothing but records, pictures, checkpoints and what `files.partial_file` removes after an hour."""
    folders = {path.name for path in sweep.store.root.glob("*/*/*") if path.is_dir()}
    files = {path.name for path in sweep.store.root.glob("*/*/*") if path.is_file()}
    assert folders == {"model"} and files == {"record.json", "layers.png", "scores.png"}
    assert not (sweep.store.root / ".sweeps").exists()
