"""What a run costs: seconds, FLOPs, bytes, passes and memory, stage by stage."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Stage:
    """One named part of a run. ``flops`` and ``bytes`` are estimates from shapes, ``seconds`` is wall time."""

    name: str
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass
class CostMeter:
    """Accumulates the cost of a run; methods add what they know, ``stage`` measures time."""

    stages: dict[str, Stage] = field(default_factory=dict)
    forward_passes: float = 0.0
    backward_passes: float = 0.0
    calibration_tokens: int = 0
    _open: list[float] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time a block under ``name``; re-entering a name adds to it.

        A stage inside another takes its seconds off the outer one, so that stages add up to wall time.
        """
        stage = self.stages.setdefault(name, Stage(name))
        self._open.append(0.0)
        start = time.perf_counter()
        try:
            yield stage
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - start
            stage.seconds += elapsed - self._open.pop()
            if self._open:
                self._open[-1] += elapsed

    def summary(self) -> dict:
        """A JSON-able account of everything metered so far."""
        return {
            "stages": [vars(stage).copy() for stage in self.stages.values()],
            "peak_memory_bytes": peak_memory_bytes(),
            "forward_passes": self.forward_passes,
            "backward_passes": self.backward_passes,
            "calibration_tokens": self.calibration_tokens,
        }


def peak_memory_bytes() -> dict[str, int]:
    """Highest resident memory of this process so far, and of each CUDA device it used."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peaks |= {f"cuda:{i}": torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())}
    return peaks
