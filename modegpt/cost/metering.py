"""What a run costs: seconds, FLOPs, bytes, passes and memory, stage by stage, and what the machine could do."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modegpt.cost.roofline import Ceiling
from modegpt.cost.work import WorkCounter


@dataclass
class Stage:
    """One named part of a run.

    Args:
        seconds: wall time, without that of stages inside.
        flops, bytes: of products and factorisations; bytes are the least traffic, every operand read and every result
            written once.
        work: ``flops`` by kind and precision, ``"forward float32"``, ``"gram float64"``, ``"product float64"`` or
            ``"factorisation float64"``: what limits them are different rates of the machine.
        within: the stage this one first ran inside.
    """

    name: str
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    work: dict[str, float] = field(default_factory=dict)
    within: str | None = None

    def add(self, kind: str, dtype: torch.dtype, *, flops: float, bytes: float = 0.0) -> None:
        """Count work of one kind in one precision."""
        self.flops += flops
        self.bytes += bytes
        if flops:
            key = f"{kind} {str(dtype).removeprefix('torch.')}"
            self.work[key] = self.work.get(key, 0.0) + flops

    def of(self, kind: str) -> float:
        """FLOPs of one kind, in any precision."""
        return sum(flops for work, flops in self.work.items() if work.split()[0] == kind)


@dataclass
class CostMeter:
    """Accumulates the cost of a run: ``stage`` measures time and counts FLOPs, methods add their passes.

    ``ceiling`` is the machine's speed, where it was measured. ``clock`` gives seconds.
    """

    stages: dict[str, Stage] = field(default_factory=dict)
    forward_passes: float = 0.0
    backward_passes: float = 0.0
    calibration_tokens: int = 0
    ceiling: Ceiling | None = None
    clock: Callable[[], float] = time.perf_counter
    _open: list[Stage] = field(default_factory=list)
    _counting: bool = False

    @contextmanager
    def stage(self, name: str, *, counted: bool = False) -> Iterator[Stage]:
        """Time a block under ``name``; re-entering a name adds to it.

        A stage inside another takes its seconds off the outer one, so that stages add up to wall time.
        ``counted``: the work inside is counted as it runs, and belongs to the innermost stage.
        """
        outer = self._open[-1] if self._open else None
        stage = self.stages.setdefault(name, Stage(name, within=None if outer is None else outer.name))
        self._open.append(stage)
        start = self.clock()
        try:
            with self._counter() if counted and not self._counting else nullcontext():
                yield stage
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            elapsed = self.clock() - start
            self._open.pop()
            stage.seconds += elapsed
            if outer is not None:
                outer.seconds -= elapsed

    @contextmanager
    def _counter(self) -> Iterator[None]:
        """One counter for all stages inside: a second one would count everything twice."""
        self._counting = True
        try:
            with WorkCounter(self._add):
                yield
        finally:
            self._counting = False

    def _add(self, kind: str, dtype: torch.dtype, *, flops: float, bytes: float = 0.0) -> None:
        self._open[-1].add(kind, dtype, flops=flops, bytes=bytes)

    def summary(self) -> dict:
        """A JSON-able account of everything metered so far."""
        return {
            "stages": [
                {key: value for key, value in vars(stage).items() if value is not None}
                for stage in self.stages.values()
            ],
            "peak_memory_bytes": peak_memory_bytes(),
            "forward_passes": self.forward_passes,
            "backward_passes": self.backward_passes,
            "calibration_tokens": self.calibration_tokens,
        } | ({} if self.ceiling is None else {"machine": vars(self.ceiling)})


def peak_memory_bytes() -> dict[str, int]:
    """Highest resident memory of this process so far, and of each CUDA device it used."""
    peaks = {"host": _peak_resident_bytes()}
    if torch.cuda.is_available():
        peaks |= {f"cuda:{i}": torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())}
    return peaks


def _peak_resident_bytes() -> int:
    """Linux's ``VmHWM``, which starts anew with a program; elsewhere ``ru_maxrss``, which on Linux begins with what the
    parent held.
    """
    try:
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
