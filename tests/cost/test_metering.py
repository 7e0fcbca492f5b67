"""The cost meter: stages add up to wall time."""

import subprocess
import sys
import time

import pytest

from modegpt.cost.metering import CostMeter, peak_memory_bytes


def test_nested_stages_do_not_count_twice() -> None:
    now = [0.0]
    meter = CostMeter(clock=lambda: now[0])
    with meter.stage("outer"):
        now[0] += 2.0
        for _ in range(2):
            with meter.stage("inner") as inner:
                now[0] += 3.0
                inner.flops += 5
    seconds = {stage["name"]: stage["seconds"] for stage in meter.summary()["stages"]}
    assert seconds == {"outer": 2.0, "inner": 6.0}
    assert meter.stages["inner"].flops == 10 and meter.stages["inner"].within == "outer"


def test_seconds_are_those_of_the_wall() -> None:
    meter, start = CostMeter(), time.perf_counter()
    with meter.stage("asleep"):
        time.sleep(0.03)
    assert 0.03 <= meter.stages["asleep"].seconds <= time.perf_counter() - start


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
