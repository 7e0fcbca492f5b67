"""The cost meter: stages add up to wall time."""

import subprocess
import sys
import time

import pytest

from modegpt.cost.metering import CostMeter, peak_memory_bytes


def test_nested_stages_do_not_count_twice() -> None:
    meter = CostMeter()
    start = time.perf_counter()
    with meter.stage("outer"):
        time.sleep(0.02)
        for _ in range(2):
            with meter.stage("inner") as inner:
                time.sleep(0.03)
                inner.flops += 5
    wall = time.perf_counter() - start
    seconds = {stage["name"]: stage["seconds"] for stage in meter.summary()["stages"]}
    assert sum(seconds.values()) == pytest.approx(wall, abs=2e-3)
    assert seconds["inner"] >= 0.06
    assert meter.stages["inner"].flops == 10


def test_a_failing_stage_is_still_timed() -> None:
    meter = CostMeter()
    with pytest.raises(RuntimeError), meter.stage("broken"):
        raise RuntimeError
    with meter.stage("next"):
        pass
    assert meter.stages["next"].seconds >= 0
    assert meter._open == []


def test_peak_memory_is_not_that_of_the_parent() -> None:
    held = bytearray(1536 * 2**20)
    held[::4096] = b"x" * len(held[::4096])  # resident
    program = "from modegpt.cost.metering import peak_memory_bytes; print(peak_memory_bytes()['host'])"
    child = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(child.stdout) < len(held) < peak_memory_bytes()["host"]
