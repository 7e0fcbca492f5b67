"""Measured rates: positive, once a process, and without touching anybody's random numbers."""

import pytest
import torch

from modegpt.cost.machine import measure_again, measure_ceiling
from modegpt.cost.roofline import Ceiling


def test_rates_are_measured_once() -> None:
    state = torch.random.get_rng_state()
    first = measure_ceiling("cpu", torch.bfloat16, size=64, budget_seconds=0.01)
    assert {"bfloat16", "float32", "float64"} == set(first.gemm)
    assert min(*first.gemm.values(), first.factorisation, first.copy) > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    measured = measure_ceiling.cache_info().misses
    assert measure_ceiling("cpu", torch.bfloat16, size=64, budget_seconds=0.01) is first
    assert measure_ceiling.cache_info().misses == measured


def test_each_operation_runs_twice_at_least_and_the_best_run_counts() -> None:
    """However busy the machine: the first run warms up. By the clock each first run takes 8 s, the second 2 s."""
    now, laps = 0.0, iter([8.0, 2.0] * 5)

    def clock() -> float:
        nonlocal now
        clock.calls += 1
        if clock.calls > 1 and clock.calls % 2 == 1:  # the end of a run
            now += next(laps)
        return now

    clock.calls = 0
    ceiling = measure_ceiling.__wrapped__("cpu", torch.bfloat16, size=8, budget_seconds=0.0, clock=clock)
    assert ceiling.gemm == dict.fromkeys(("bfloat16", "float32", "float64"), 2 * 8**3 / 2.0)
    assert ceiling.factorisation == pytest.approx(8**3 / 3 / 2.0) and ceiling.copy == 2 * 2**26 / 2.0


def test_a_second_measurement_only_raises_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy moment before a run, or after it, does no harm if the other is quiet."""
    quiet = Ceiling(device="cpu", gemm={"float32": 100.0, "float64": 50.0}, factorisation=10.0, copy=4.0, size=1)
    busy = Ceiling(device="cpu", gemm={"float32": 12.0, "float64": 60.0}, factorisation=1.0, copy=5.0, size=1)
    best = Ceiling(device="cpu", gemm={"float32": 100.0, "float64": 60.0}, factorisation=10.0, copy=5.0, size=1)
    assert quiet.best(busy) == busy.best(quiet) == best
    measured = measure_ceiling("cpu", torch.float32, size=64, budget_seconds=0.01)
    monkeypatch.setattr(measure_ceiling, "__wrapped__", lambda *_: busy)
    assert measure_again(quiet, "cpu", torch.float32) == best
    assert measure_ceiling("cpu", torch.float32, size=64, budget_seconds=0.01) is measured


def test_seconds_use_the_rate_that_limits() -> None:
    ceiling = Ceiling(device="cpu", gemm={"float32": 100.0, "float64": 50.0}, factorisation=10.0, copy=1.0, size=1)
    assert ceiling.seconds("forward float32", 200.0) == 2.0
    assert ceiling.seconds("gram float64", 200.0) == 4.0
    assert ceiling.seconds("factorisation float64", 200.0) == 20.0
