"""Sweeps: one failing job stops no other, the last lines and the exit code say so, whichever launcher ran them."""

from collections.abc import Callable
from pathlib import Path

import pytest

import modegpt.cli.sweep

JOBLIB = ("hydra/launcher=workstation", "hydra.launcher.n_jobs=2")


def done(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("done-*"))


@pytest.mark.parametrize("launcher", [(), JOBLIB], ids=["basic", "joblib"])
def test_a_failure_is_named_and_alone(process: Callable, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    finished = process("--multirun", "compression.sparsity=0.1,0.5,0.2", f"output.root={tmp_path}/results", *launcher)
    assert finished.returncode == 1
    assert done(tmp_path / "results") == ["done-0.1-0", "done-0.2-0"]
    *_, failed, last = finished.stderr.splitlines()
    assert failed.startswith("failed: job 1 (compression.sparsity=0.5") and failed.endswith(
        "unexpected ValueError: planned failure"
    )
    assert last.startswith("error: 1 of 3 jobs of the sweep failed")


@pytest.mark.slow
def test_submitit_loses_neither_a_failed_nor_a_killed_job(process: Callable, tmp_path: Path) -> None:
    finished = process(
        "--multirun", "compression.sparsity=0.5,0.6,0.1", f"output.root={tmp_path}/results", "hydra/launcher=node"
    )
    assert finished.returncode == 1
    assert "failed: job 0 (compression.sparsity=0.5" in finished.stderr
    assert "failed: job 1 (compression.sparsity=0.6" in finished.stderr and "left no outcome" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert "jobs of the sweep failed (unexpected UncompletedJobError" in finished.stderr.splitlines()[-1]


def test_joblib_misses_a_killed_worker(process: Callable, tmp_path: Path) -> None:
    """Jobs that had not finished are lost with it; the same command again runs them."""
    arguments = ("--multirun", "compression.sparsity=0.6,0.1,0.2,0.3", f"output.root={tmp_path}/results", *JOBLIB)
    finished = process(*arguments)
    assert finished.returncode == 1
    assert "failed: job 0 (compression.sparsity=0.6" in finished.stderr and "left no outcome" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert "(unexpected TerminatedWorkerError" in finished.stderr.splitlines()[-1]
    assert process(*arguments).returncode == 0
    assert done(tmp_path / "results") == ["done-0.1-0", "done-0.2-0", "done-0.3-0", "done-0.6-0"]


def test_a_faultless_sweep_leaves_only_results(process: Callable, tmp_path: Path) -> None:
    root = tmp_path / "results"
    finished = process("--multirun", "seed=1,2", "compression.sparsity=0.1,0.2", f"output.root={root}")
    assert finished.returncode == 0, finished.stderr
    assert [path.relative_to(root).as_posix() for path in sorted(root.rglob("*"))] == [
        "done-0.1-1",
        "done-0.1-2",
        "done-0.2-1",
        "done-0.2-2",
    ]
    assert (root / "done-0.2-1").read_text() == f"modegpt seed=1 compression.sparsity=0.2 output.root={root}"


def test_a_sweep_says_where_it_is_and_the_time_left(
    job: Callable, capfd: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter((0.0, 60.0, 180.0))
    monkeypatch.setattr(modegpt.cli.sweep.time, "monotonic", lambda: next(moments))
    job("-m", "seed=1,2,3", f"output.root={tmp_path}/results")
    heads = [line.partition("]")[0] for line in capfd.readouterr().out.splitlines()]
    assert heads == ["[1/3", "[2/3, 2 min left", "[3/3, 2 min left"]


def test_ranges_are_checked_job_by_job(job: Callable, capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    code, calls = job("--multirun", "compression.sparsity=1.5,0.2", f"output.root={tmp_path}/results")
    assert code == 1
    assert [config.compression.sparsity for config, _ in calls] == [0.2]
    assert "failed: job 0 (compression.sparsity=1.5" in capfd.readouterr().err


def test_globs_and_quiet(job: Callable, capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    code, calls = job("-m", "decomposition/query_key=glob(cr*)", "quiet=true", f"output.root={tmp_path}/results")
    assert code == 0
    assert [config.decomposition.query_key["name"] for config, _ in calls] == ["cr", "cr_pairs"]
    assert capfd.readouterr().err == ""


def test_flags_may_stand_anywhere(job: Callable, tmp_path: Path) -> None:
    code, calls = job("seed=1,2", "--multirun", f"output.root={tmp_path}/results")
    assert code == 0 and [config.seed for config, _ in calls] == [1, 2]
