"""What the machine can do: a product, a factorisation and a copy, timed."""

import functools
import time
from collections.abc import Callable

import torch

from modegpt.cost.roofline import Ceiling

SIZE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices timed: large enough for nearly the full rate, small enough for a fraction of a second."""
COPY_BYTES = {"cpu": 2**26, "cuda": 2**32}
BUDGET_SECONDS = 0.25
"""For everything together; on a busy machine each operation still runs ``LEAST_REPEATS`` times."""
REPEATS = 5
LEAST_REPEATS = 2
"""The first run of an operation warms up: it loads code and touches memory that was never there."""


def measure_again(known: Ceiling, device: str, dtype: torch.dtype) -> Ceiling:
    """The best of ``known`` and of another measurement, made at another moment of a machine that may be busy.

    ``known`` alone where the device has no room for another one now.
    """
    try:
        return known.best(measure_ceiling.__wrapped__(device, dtype))
    except torch.OutOfMemoryError:
        return known


@functools.cache
def measure_ceiling(
    device: str,
    dtype: torch.dtype,
    size: int | None = None,
    budget_seconds: float = BUDGET_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Ceiling:
    """Measure ``device`` with PyTorch's present number of threads, once a process, in about ``BUDGET_SECONDS``.

    Products in ``dtype``, float32 and float64, of square matrices of ``size`` (default: by device). The best run
    counts: what else the machine does can only slow it down. ``budget_seconds`` buys more runs, and larger matrices.
    """
    deadline = clock() + budget_seconds
    kind = torch.device(device).type
    size = size or SIZE.get(kind, 1024)
    generator = torch.Generator(device).manual_seed(0)
    square = torch.randn(size, size, generator=generator, device=device, dtype=torch.float32)

    def product_rate(product_dtype: torch.dtype) -> float:
        A = square.to(product_dtype)
        out = torch.empty_like(A)
        return 2.0 * size**3 / _seconds(lambda: torch.mm(A, A, out=out), device, deadline, clock)

    products = {str(each).removeprefix("torch."): product_rate(each) for each in {dtype, torch.float32, torch.float64}}
    definite = square.double()
    definite = definite + definite.T
    definite.diagonal().add_(4.0 * size)
    factor = torch.empty_like(definite), torch.empty((), dtype=torch.int32, device=device)
    cholesky = _seconds(lambda: torch.linalg.cholesky_ex(definite, out=factor), device, deadline, clock)
    source = torch.ones(COPY_BYTES.get(kind, 2**26) // 4, device=device)
    target = torch.zeros_like(source)
    copy = _seconds(lambda: target.copy_(source), device, deadline, clock)
    return Ceiling(
        device=kind, gemm=products, factorisation=size**3 / 3 / cholesky, copy=2.0 * source.nbytes / copy, size=size
    )


def _seconds(operation: Callable[[], object], device: str, deadline: float, clock: Callable[[], float]) -> float:
    """The shortest of ``REPEATS`` runs, or of as many as end before the ``deadline``; of ``LEAST_REPEATS`` at least."""
    best = float("inf")
    for count in range(1, REPEATS + 1):
        start = clock()
        operation()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        stop = clock()
        best = min(best, stop - start)
        if stop > deadline and count >= LEAST_REPEATS:
            break
    return best
