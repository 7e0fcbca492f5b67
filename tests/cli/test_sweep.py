"""Sweeps: one failing job stops no other, the last lines and the exit code say so, whichever launcher ran them."""

import errno
import os
import pty
import signal
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import modegpt.cli.sweep
from modegpt.files import hold

WORKSTATION = ("hydra/launcher=workstation", "hydra.launcher.n_jobs=2")
NODE = ("hydra/launcher=node", "hydra.sweeper.max_batch_size=2")
LAUNCHERS = {"basic": (), "workstation": WORKSTATION, "node": NODE}
PARALLEL = pytest.mark.parametrize("launcher", [WORKSTATION, NODE], ids=["workstation", "node"])


def done(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("done-*"))


@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_a_failure_is_named_and_alone(process: Callable, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    finished = process("--multirun", "compression.sparsity=0.1,0.5,0.2", f"output.root={tmp_path}/results", *launcher)
    assert finished.returncode == 1
    assert done(tmp_path / "results") == ["done-0.1-0", "done-0.2-0"]
    *_, failed, last = finished.stderr.splitlines()
    assert failed.startswith("failed: job 1 (compression.sparsity=0.5") and failed.endswith(
        "unexpected ValueError: planned failure"
    )
    assert last.startswith("error: 1 of 3 jobs of the sweep failed; tracebacks")


@PARALLEL
def test_a_killed_job_takes_no_other_with_it(process: Callable, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    """More jobs than a batch, or than workers; the same command again runs the one that is missing."""
    arguments = ("--multirun", "compression.sparsity=0.6,0.1,0.2,0.3,0.4", f"output.root={tmp_path}/results", *launcher)
    finished = process(*arguments)
    assert finished.returncode == 1
    assert done(tmp_path / "results") == ["done-0.1-0", "done-0.2-0", "done-0.3-0", "done-0.4-0"]
    *_, failed, last = finished.stderr.splitlines()
    assert failed.startswith("failed: job 0 (compression.sparsity=0.6")
    assert failed.endswith("its process was killed (SIGKILL)")
    assert last.startswith("error: 1 of 5 jobs of the sweep failed; ") and "Traceback" not in finished.stderr
    assert process(*arguments).returncode == 0
    assert len(done(tmp_path / "results")) == 5 and not (tmp_path / "results" / ".sweeps").exists()


def test_jobs_are_shown_whole_when_they_end(process: Callable, tmp_path: Path) -> None:
    root = f"{tmp_path}/results"
    finished = process("--multirun", "seed=1,2,3", f"output.root={root}", *WORKSTATION)
    assert finished.returncode == 0, finished.stderr
    blocks = sorted(finished.stdout.split("[job ")[1:])
    assert blocks == [
        f"{number}] seed={seed} output.root={root}\nsaid by modegpt seed={seed} output.root={root}\n"
        for number, seed in enumerate((1, 2, 3))
    ]


@PARALLEL
def test_what_jobs_print_stays_off_the_bar(process: Callable, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    """On a terminal: the bar is wiped first, and drawn again below."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 100))
    started = process(
        "--multirun", "seed=1,2,3", f"output.root={tmp_path}/results", *launcher,
        timeout=None, stdout=its, stderr=its,
    )  # fmt: skip
    os.close(its)
    written = b""
    with suppress(OSError):  # as Linux says that no process has the terminal open any more
        while part := os.read(ours, 1 << 16):
            written += part
    os.close(ours)
    assert started.wait() == 0
    assert b"sweep:   0%|" in written and written.count(b"[job ") == 3

    def seen(line: str) -> str:
        """What a terminal shows of a line whose parts each begin at its start."""
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        return shown.rstrip()

    lines = [seen(line) for line in written.decode().split("\n")]
    assert sorted(line[:14] for line in lines if "[job " in line) == [
        f"[job {number}] seed={number + 1}" for number in range(3)
    ]
    assert all(line.startswith("said by modegpt ") for line in lines if "said" in line)


@pytest.mark.parametrize(
    ("launcher", "number"),
    [((), signal.SIGTERM), (WORKSTATION, signal.SIGTERM), (NODE, signal.SIGINT)],
    ids=["basic-SIGTERM", "workstation-SIGTERM", "node-SIGINT"],
)
def test_a_signal_ends_a_sweep_and_its_workers(
    process: Callable, tmp_path: Path, launcher: tuple[str, ...], number: signal.Signals
) -> None:
    root = tmp_path / "results"
    started = process(
        "--multirun", "compression.sparsity=0.7", "seed=1,2,3", f"output.root={root}", *launcher, timeout=None
    )
    at_work = 1 if launcher == () else 2

    def begun() -> list[int]:
        return [int(path.read_text() or 0) for path in root.glob("begun-*")]

    while len(begun()) < at_work or 0 in begun():
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(number)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 128 + number
    reason = "terminated (SIGTERM)" if number == signal.SIGTERM else "interrupted"
    assert errors.splitlines()[-1].startswith(f"error: {at_work} of 3 jobs of the sweep failed ({reason}), ")
    assert f"{3 - at_work} have no outcome" in errors
    assert not [pid for pid in begun() if Path(f"/proc/{pid}").exists()]


def test_the_next_sweep_clears_what_no_process_holds(job: Callable, tmp_path: Path) -> None:
    sweeps = tmp_path / "results" / ".sweeps"
    for name in ("killed", "at work", "queued/.submitit"):
        (sweeps / name).mkdir(parents=True)
    held = hold(sweeps / "at work")
    elsewhere = f"hydra.sweep.dir={tmp_path}/sweep"  # whose neighbours are none of ours
    assert job("-m", "seed=1,2", f"output.root={tmp_path}/results", elsewhere)[0] == 0 and len([*sweeps.iterdir()]) == 3
    assert job("-m", "seed=1,2", f"output.root={tmp_path}/results")[0] == 0
    assert {path.name for path in sweeps.iterdir()} == {"at work", "queued"}
    os.close(held)


def test_a_full_disk_stops_no_sweep(
    job: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(modegpt.cli.sweep, "write_text", full)
    code, calls = job("-m", "seed=1,2", f"output.root={tmp_path}/results")
    assert code == 1 and [config.seed for config, _ in calls] == [1, 2]
    errors = capfd.readouterr().err
    assert errors.count("outcome.json: No space left on device") == 2 and "2 have no outcome" in errors


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
    assert [config.decomposition.query_key["name"] for config, _ in calls] == ["cr", "cr_pairs", "cr_shared"]
    assert capfd.readouterr().err == ""


def test_flags_may_stand_anywhere(job: Callable, tmp_path: Path) -> None:
    code, calls = job("seed=1,2", "--multirun", f"output.root={tmp_path}/results")
    assert code == 0 and [config.seed for config, _ in calls] == [1, 2]
