"""Measured rates: positive, once a process, and without touching anybody's random numbers."""

import time

import torch

from modegpt.cost.machine import measure_ceiling
from modegpt.cost.roofline import Ceiling


def test_rates_are_measured_once() -> None:
    state = torch.random.get_rng_state()
    first = measure_ceiling("cpu", torch.bfloat16, size=64, budget_seconds=0.01)
    assert {"bfloat16", "float32", "float64"} == set(first.gemm)
    assert min(*first.gemm.values(), first.factorisation, first.copy) > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    start = time.perf_counter()
    assert measure_ceiling("cpu", torch.bfloat16, size=64, budget_seconds=0.01) is first
    assert time.perf_counter() - start < 0.01


def test_seconds_use_the_rate_that_limits() -> None:
    ceiling = Ceiling(device="cpu", gemm={"float32": 100.0, "float64": 50.0}, factorisation=10.0, copy=1.0, size=1)
    assert ceiling.seconds("forward float32", 200.0) == 2.0
    assert ceiling.seconds("gram float64", 200.0) == 4.0
    assert ceiling.seconds("factorisation float64", 200.0) == 20.0
