"""All that wants one GPU of 80 GB, in minutes and with nothing to decide: ``python benchmarks/gpu.py [--help]``.

Five steps, in order: whether CPU and GPU agree; what compressing 7B to 70B takes; whether Gram products gain from a
second stream; dense against compressed inference; scoring. ``gpu_steps.py`` has them. Each step is a process of its own
and has a share of the time; what it leaves goes to the next. It writes its record, ``<output>/<step>.json``, anew after
each part, and names there what failed and what was skipped. ``<output>/timeline.json`` comes last. ``--plan`` prints
what each part should take, and measures nothing; ``--parts`` leaves the others out. ``gpu_wheels.sh`` collects what a
machine without a network lacks.
"""

import argparse
import gc
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
SHARES = {"correct": 0.20, "cost": 0.40, "overlap": 0.06, "inference": 0.26, "evaluation": 0.08}
"""Of the whole time, by step; of some parts alone, each step has what they should take."""
FAREWELL_SECONDS = 4.0
"""Kept back at the end of a step: to write, and to end its process."""


class OutOfTime(BaseException):
    """The step's time is over. No Exception: what catches those must not go on."""


def main() -> int:
    """Run the steps; 1 where a part failed or missed what it checks, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--output", type=Path, help="a folder without records; default: results/gpu/<time>")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", default="full", choices=("full", "tiny"), help="tiny: to rehearse on a CPU")
    parser.add_argument("--plan", action="store_true", help="print the time line and measure nothing")
    parser.add_argument("--parts", type=re.compile, help="only those whose name has this regular expression in it")
    parser.add_argument("--step", choices=SHARES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(CHECKOUT))  # nothing of ours need be installed
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    if arguments.step:
        return step(arguments)
    if arguments.plan:
        return plan(arguments)
    arguments.output = arguments.output or Path("results", "gpu", datetime.now(UTC).strftime("%Y-%m-%d-%H%M%S"))
    if any((arguments.output / f"{name}.json").exists() for name in (*SHARES, "timeline")):
        parser.error(f"--output {arguments.output} has records already; name another folder")
    shares = shares_of(arguments)
    if not shares:
        parser.error(f"--parts {arguments.parts.pattern} is in no name; --plan prints them all")
    return run(arguments, shares)


def chosen(name: str, setting: Any, arguments: argparse.Namespace) -> list[Any]:
    """The parts of a step that are asked for."""
    from gpu_steps import STEPS

    parts = STEPS[name](setting)
    return parts if arguments.parts is None else [part for part in parts if arguments.parts.search(part.name)]


def shares_of(arguments: argparse.Namespace) -> dict[str, float]:
    """Of the whole time, by step, for the parts that are asked for; a step without any has none."""
    if arguments.parts is None:
        return SHARES
    from gpu_steps import SCALES, Setting

    setting = Setting(device=arguments.device, **SCALES[arguments.scale])
    seconds = {name: sum(part.seconds for part in chosen(name, setting, arguments)) for name in SHARES}
    return {name: each / sum(seconds.values()) for name, each in seconds.items() if each > 0}


def plan(arguments: argparse.Namespace) -> int:
    """What each part should take."""
    from gpu_steps import GIVEN_GPU, SCALES, Setting

    setting, total = Setting(device=arguments.device, **SCALES[arguments.scale]), 0.0
    print(f"Seconds expected on an {GIVEN_GPU} at true shapes, by nominal rates; results/gpu has what was measured.")
    for name, share in shares_of(arguments).items():
        print(f"{name}: {share * 60 * arguments.minutes:.0f} s of {60 * arguments.minutes:.0f} s")
        for part in chosen(name, setting, arguments):
            total += part.seconds
            print(f"  {part.seconds:6.0f}  {part.name}{', and what is left of the step' if part.stretches else ''}")
    print(f"  {total:6.0f}  in all")
    return 0


def run(arguments: argparse.Namespace, shares: dict[str, float]) -> int:
    """All steps that have a share, one process after the other; the next one imports while this one works."""
    deadline = time.monotonic() + 60 * arguments.minutes
    names, report = list(shares), []
    waiting = _start(names[0], arguments)
    for index, name in enumerate(names):
        process = waiting
        if index + 1 < len(names):
            waiting = _start(names[index + 1], arguments)
        reserved = 60 * arguments.minutes * sum(shares[later] for later in names[index + 1 :])
        end, began = deadline - reserved, time.monotonic()
        print(f"{60 * arguments.minutes - (deadline - began):5.0f} s  {name}: {end - began:.0f} s at most", flush=True)
        status = "done"
        try:
            process.communicate(f"{end}\n", timeout=max(end - began, 0.0) + FAREWELL_SECONDS)
            if process.returncode != 0:
                status = f"ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            status = "stopped: it did not end in its time"
        report.append({"step": name, "status": status, "began": began, "seconds": time.monotonic() - began})
    return _conclude(report, arguments)


def _start(name: str, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--step", name, "--output", str(arguments.output)]
    command += ["--device", arguments.device, "--scale", arguments.scale, "--minutes", str(arguments.minutes)]
    if arguments.parts is not None:
        command += ["--parts", arguments.parts.pattern]
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True)


def _conclude(report: list[dict[str, Any]], arguments: argparse.Namespace) -> int:
    """The time line, from the records of the steps; 0 where all was done and came out as it should."""
    from modegpt.files import read_json
    from modegpt.records.benchmark import write_benchmark

    good, first = True, report[0]["began"]
    for entry in report:
        entry["began"] -= first
        path = arguments.output / f"{entry['step']}.json"
        parts = read_json(path)["parts"] if path.exists() else []
        entry["parts"] = [{key: part.get(key) for key in ("name", "status", "reason")} for part in parts]
        good &= entry["status"] == "done" and all(part["status"] == "done" for part in parts)
        good &= all(part["result"].get("met") is not False for part in parts if part["status"] == "done")
        print(f"{entry['began']:5.0f} s  {entry['step']}: {entry['status']}, {entry['seconds']:.0f} s")
        for part in entry["parts"]:
            if part["status"] != "done":
                print(f"         {part['name']}: {part['status']}, {part['reason']}")
    content = {"kind": "gpu timeline", "minutes": arguments.minutes, "scale": arguments.scale, "steps": report}
    print(write_benchmark(arguments.output / "timeline.json", content))
    return 0 if good else 1


def step(arguments: argparse.Namespace) -> int:
    """One step, until the moment that standard input names; it imports everything before it asks."""
    import torch
    from gpu_steps import SCALES, Setting, rates

    from modegpt.records.benchmark import write_benchmark

    setting, line = Setting(device=arguments.device, **SCALES[arguments.scale]), sys.stdin.readline()
    if not line:  # the one who would say when to begin is gone
        return 1
    end = float(line) - FAREWELL_SECONDS
    if setting.on_gpu:
        rates(setting)  # fails here, and not in each part, where there is no GPU
    else:
        torch.set_num_threads(1)
    took: list[tuple[float, float]] = []
    record = {"kind": "gpu", "step": arguments.step, "settings": vars(setting), "parts": []}
    began, parts = time.monotonic(), chosen(arguments.step, setting, arguments)
    for index, part in enumerate(parts):
        left = end - time.monotonic() - sum(later.seconds for later in parts[index + 1 :] if later.stretches)
        pace = sum(actual for _, actual in took) / sum(wanted for wanted, _ in took) if took else 1.0
        entry: dict[str, Any]
        if left <= 0 or (pace * part.seconds > left and not part.stretches):
            entry = {"status": "skipped", "reason": f"{left:.0f} s left, {pace * part.seconds:.0f} s expected"}
        else:
            start = time.monotonic()
            entry = attempt(part, left)
            wall_seconds = time.monotonic() - start
            entry["wall_seconds"] = wall_seconds
            if entry["status"] == "done" and not part.stretches:
                took.append((part.seconds, wall_seconds))
        record["parts"].append({"name": part.name, "expected_seconds": part.seconds, **entry})
        say(record["parts"][-1], time.monotonic() - began)
        if entry["status"] != "skipped" or index + 1 == len(parts):
            write_benchmark(arguments.output / f"{arguments.step}.json", record)
        if not _usable(setting):
            return 1
    return 0


def attempt(part: Any, seconds: float) -> dict[str, Any]:
    """What ``part`` measured, or why it did not; a failure holds no number."""
    from gpu_steps import Absent

    from modegpt.records.schema import json_problems

    try:
        with alarm(seconds):
            result = dict(part.measure(seconds))
        for problem in json_problems(result):
            raise ValueError(problem)
    except Absent as error:
        return {"status": "skipped", "reason": str(error)}
    except (Exception, OutOfTime) as error:
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
    return {"status": "done", "result": result}


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after ``seconds``."""

    def ring(*_: object) -> None:
        raise OutOfTime(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def say(part: dict[str, Any], seconds: float) -> None:
    """A line about a part, ``seconds`` after the step began."""
    from gpu_steps import headline

    text = ", ".join(headline(part["result"])) if part["status"] == "done" else f"{part['status']}: {part['reason']}"
    print(f"{seconds:7.0f} s  {part['name']}: {text}", flush=True)


def _usable(setting: Any) -> bool:
    """Free what the last part left; False where the GPU takes no more work: what came later would be no result."""
    import torch

    gc.collect()
    if setting.on_gpu:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        except RuntimeError:
            traceback.print_exc()
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
