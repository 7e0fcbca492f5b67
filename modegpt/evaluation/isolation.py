"""lm-evaluation-harness without its bars and logs, its hold on global random state, and its slowest habit."""

import functools
import gc
import io
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import numpy as np
import torch

from modegpt.progress import errors_only

LOGGERS = ("lm_eval", "datasets")


@contextmanager
def isolated_harness() -> Iterator[None]:
    """Run harness code silently, from fixed seeds, and leave no trace of it in this process.

    Its bars and warnings are dropped (exceptions pass; a bar of ours opened before stays visible). Global random states
    are as they were afterwards. Each prompt template is compiled once instead of once a use, which is nine tenths of
    the time the harness takes to build requests, and garbage collection looks only at what is made meanwhile.
    """
    with _silence(), _fixed_randomness(seed=0), _templates_compiled_once(), _present_objects_uncollected():
        yield


@contextmanager
def _silence() -> Iterator[None]:
    import datasets

    bars_were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with errors_only(LOGGERS), redirect_stderr(io.StringIO()):
            yield
    finally:
        if not bars_were_off:
            datasets.enable_progress_bars()


@contextmanager
def _fixed_randomness(seed: int) -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def _templates_compiled_once() -> Iterator[None]:
    from lm_eval.utils import env

    env.from_string = functools.lru_cache(maxsize=None)(type(env).from_string.__get__(env))
    try:
        yield
    finally:
        del env.from_string


@contextmanager
def _present_objects_uncollected() -> Iterator[None]:
    # thousands of requests trigger full collections, each of which would visit the million objects imported before
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
