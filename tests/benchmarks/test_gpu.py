"""The prepared GPU script: nothing that fails or is skipped looks like a number, and the whole of it runs on a CPU."""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.scripts import CHECKOUT, load_script
from tests.test_simulated_gpu import simulated

gpu, steps = load_script("benchmarks/gpu"), load_script("benchmarks/gpu_steps")


def part(name: str, measure, *, seconds: float = 0.1, stretches: bool = False):
    return steps.Part(name, seconds, measure, stretches)


def absent(_: float) -> dict:
    raise steps.Absent("no such model")


def broken(_: float) -> dict:
    raise RuntimeError("a kernel failed")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The step's clock: only a part moves it, however busy the machine is."""
    seconds = [0.0]
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    return seconds


def stuck(now: list[float]):
    """What takes all that it is given, and would take more."""

    def measure(seconds: float) -> dict:
        try:
            time.sleep(30)
        finally:
            now[0] += seconds
        return {}

    return measure


def run_step(monkeypatch: pytest.MonkeyPatch, folder: Path, parts: list, *, seconds: float) -> tuple[int, list[dict]]:
    """The status and the parts that the record of a step made of ``parts`` holds."""
    monkeypatch.setitem(steps.STEPS, "cost", lambda _: parts)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{gpu.time.monotonic() + seconds + gpu.FAREWELL_SECONDS}\n"))
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py"])
    arguments = argparse.Namespace(step="cost", device="cpu", scale="tiny", minutes=9.0, output=folder, parts=None)
    status = gpu.step(arguments)
    return status, json.loads((folder / "cost.json").read_text())["parts"]


def test_a_failing_part_stops_nothing_and_holds_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = [
        part("broken", broken),
        part("not finite", lambda _: {"seconds": math.nan}),
        part("absent", absent),
        part("good", lambda seconds: {"seconds": 0.5}),
    ]
    status, found = run_step(monkeypatch, tmp_path, parts, seconds=60)
    assert status == 0
    assert [each["status"] for each in found] == ["failed", "failed", "skipped", "done"]
    assert "a kernel failed" in found[0]["reason"] and "no such model" in found[2]["reason"]
    assert all("result" not in each for each in found[:3]) and found[3]["result"] == {"seconds": 0.5}


def test_what_has_no_time_is_skipped_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, now: list[float]
) -> None:
    parts = [
        part("too long", absent, seconds=100.0),
        part("stuck", stuck(now)),
        part("after", lambda _: {"seconds": 0.0}),
    ]
    _, found = run_step(monkeypatch, tmp_path, parts, seconds=0.5)
    assert [each["status"] for each in found] == ["skipped", "failed", "skipped"]
    assert "100 s expected" in found[0]["reason"] and "OutOfTime" in found[1]["reason"]


def test_every_part_is_in_the_record_and_what_was_done_is_there_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, now: list[float]
) -> None:
    seen = []

    def looks(_: float) -> dict:
        seen.append([each["name"] for each in json.loads((tmp_path / "cost.json").read_text())["parts"]])
        return {}

    parts = [part("one", lambda _: {}), part("no time", absent, seconds=9.0), part("two", looks), part("last", absent)]
    _, found = run_step(monkeypatch, tmp_path, parts, seconds=1.0)
    assert seen == [["one"]] and [each["name"] for each in found] == ["one", "no time", "two", "last"]


def test_the_pace_of_earlier_parts_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, now: list[float]) -> None:
    """The first part takes ten times what was expected, so the second one would not end in time."""

    def slow(_: float) -> dict[str, Any]:
        now[0] += 0.5
        return {}

    parts = [
        part("first", slow, seconds=0.05),
        part("second", lambda _: {}, seconds=1.0),
        part("stretches", lambda seconds: {"given": seconds}, seconds=1.0, stretches=True),
    ]
    _, found = run_step(monkeypatch, tmp_path, parts, seconds=5.0)
    assert [each["status"] for each in found] == ["done", "skipped", "done"]
    assert found[2]["result"]["given"] == pytest.approx(4.5)


def test_no_part_takes_the_time_of_one_that_stretches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, now: list[float]
) -> None:
    stretching = part("stretches", lambda seconds: {"given": seconds}, seconds=2.0, stretches=True)
    _, found = run_step(monkeypatch, tmp_path, [part("stuck", stuck(now)), stretching], seconds=2.5)
    assert [each["status"] for each in found] == ["failed", "done"]
    assert found[1]["result"]["given"] == pytest.approx(2.0)


def test_what_catches_exceptions_does_not_go_on_when_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, now: list[float]
) -> None:
    def goes_on(_: float) -> dict:
        with suppress(Exception):
            time.sleep(30)
        return {"seconds": 0.0}

    _, found = run_step(monkeypatch, tmp_path, [part("goes on", goes_on)], seconds=0.5)
    assert "OutOfTime" in found[0]["reason"]


def test_what_it_takes_to_import_is_part_of_the_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, now: list[float]
) -> None:
    """A step that is ready after its end measures nothing."""
    _, found = run_step(monkeypatch, tmp_path, [part("late", lambda _: {})], seconds=-1.0)
    assert [each["status"] for each in found] == ["skipped"]


def test_tests_that_hang_are_ended_with_their_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What ran before is in the record."""
    program = tmp_path / "pytest.py"
    program.write_text(
        "import subprocess, sys, time\n"
        "print('[gw0] [ 25%] PASSED tests/gpu/test_a.py::test_one ')\n"
        "print('[gw1] [ 50%] FAILED tests/gpu/test_a.py::test_two ', flush=True)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    began = time.monotonic()
    found = steps.gpu_tests(3.0)
    assert time.monotonic() - began < 10
    assert found["status"] is None and not found["met"]
    assert found["counts"] == {"passed": 1, "failed": 1} and found["failed"] == ["tests/gpu/test_a.py::test_two"]


def test_a_broken_device_ends_the_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "_usable", lambda _: False)
    status, found = run_step(monkeypatch, tmp_path, [part("broken", broken), part("after", absent)], seconds=60)
    assert status == 1 and [each["name"] for each in found] == ["broken"]


def test_the_whole_time_is_shared_out_and_the_plan_fits() -> None:
    assert sum(gpu.SHARES.values()) == pytest.approx(1) and list(gpu.SHARES) == list(steps.STEPS)
    setting = steps.Setting(device="cuda")
    for name, parts in steps.STEPS.items():
        assert sum(part.seconds for part in parts(setting)) < gpu.SHARES[name] * 540 - gpu.FAREWELL_SECONDS, name


def test_an_old_record_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "cost.json").write_text("{}")
    done = run_script(tmp_path, "--minutes", "1")
    assert done.returncode == 2 and "has records already" in done.stderr


def test_some_parts_alone_share_the_time(tmp_path: Path) -> None:
    done = run_script(tmp_path, "--plan", "--parts", "7B, (uniform|entropic)|gain")
    assert [line.split()[0] for line in done.stdout.splitlines() if " s of " in line] == ["cost:", "overlap:"]
    assert [line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("  ")] == [
        *("7B, uniform", "7B, entropic", "gain on 7B", "in all")
    ]
    done = run_script(tmp_path, "--parts", "8B, nothing")
    assert done.returncode == 2 and "--plan prints them all" in done.stderr


def run_script(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--scale", "tiny", "--output", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    return subprocess.run(
        [*command, *options], cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False
    )


@simulated
def test_the_steps_on_a_simulated_gpu() -> None:
    """All but what is compiled: every tensor is where it should be, and a graph holds kernels alone."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulated_gpu_steps"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    for name in ("correct", "cost", "overlap", "inference", "evaluation"):
        assert any(line.startswith(f"{name}: ") for line in lines), name
    [replays] = [line for line in lines if line.endswith(" replays")]
    assert int(replays.split()[0]) == 2 * 2 * 3 * 2, "phases, batches, models, rounds"


@pytest.mark.large
def test_the_whole_script_runs_on_a_cpu(tmp_path: Path) -> None:
    """Small shapes, the same code; without a GPU nothing overlaps, and a gain or a goal may be missed."""
    done = run_script(tmp_path / "records", "--minutes", "20")
    timeline = json.loads((tmp_path / "records" / "timeline.json").read_text())
    assert [step["status"] for step in timeline["steps"]] == ["done"] * 5, done.stdout + done.stderr[-3000:]
    failed = [part for step in timeline["steps"] for part in step["parts"] if part["status"] == "failed"]
    assert not failed, done.stderr[-3000:]
    found = {name: json.loads((tmp_path / "records" / f"{name}.json").read_text())["parts"] for name in gpu.SHARES}
    correct = {each["name"]: each["result"] for each in found["correct"] if each["status"] == "done"}
    assert correct["tiny-llama, modegpt"]["ranks_agree"]
    assert correct["tiny-llama, modegpt"]["relative_difference"]["float32"] == 0, "both sides are the same device"
    assert correct["tiny-llama, modegpt"]["relative_difference"]["bfloat16"] > 0
    whole = {each["name"]: each["result"] for each in found["cost"]}
    assert whole["70B, by layers"]["num_layers"] == whole["70B, by layers"]["of_layers"] == 2
    assert whole["70B, by layers"]["extrapolated_seconds"] == pytest.approx(whole["70B, by layers"]["seconds"])
    assert set(whole["13B, entropic"]["floor_seconds"]) == {"forward", "gram", "factorisation"}
    assert found["overlap"][0]["result"]["num_equal"] == {"in line": 2, "beside": 2}
    ways = {each["name"]: each for each in found["inference"]}
    assert [ways[f"captured, {phase}"]["status"] for phase in ("decode", "prefill")] == ["skipped"] * 2
    for phase in ("decode", "prefill"):
        eager, compiled = (ways[f"{way}, {phase}"]["result"] for way in ("eager", "compiled"))
        assert compiled["layers"] == 1 and eager["layers"] == 2
        assert {entry["phase"] for entry in (*eager["measurements"], *compiled["measurements"])} == {phase}
    assert found["evaluation"][1]["result"]["requests_per_second"] > 0


def test_fewer_layers_where_there_is_less_time() -> None:
    setting = steps.Setting(device="cpu", **steps.SCALES["tiny"] | {"layers": 50})
    found = steps.by_layers("70B", setting, torch.float32, None, 0.5)
    assert 1 <= found["num_layers"] < 50
    assert found["extrapolated_seconds"] == pytest.approx(found["seconds"] * 50 / found["num_layers"])
