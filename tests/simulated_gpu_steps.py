"""What ``benchmarks/gpu.py`` measures, on the simulated GPU: ``python -m tests.simulated_gpu_steps`` names what ran.

At the small scale, and not all: nothing compiled, no tests, of each kind of measurement one. Streams are those of
``simulated_streams``. A CUDA graph refuses what a real one does while it is captured: to wait for a number, and to copy
between the devices.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from modegpt.cost import machine
from modegpt.evaluation import throughput
from tests import simulated_gpu
from tests.scripts import load_script
from tests.simulated_streams import Watch

LEFT_OUT = ("tests", "compiled", "tiny-opt", "stories260K", "babyllama", "7B, uniform", "7B, plus", "13B", "Llama-3")
REPLAYED: list[str] = []


def refuse(name: str, reads: list[Tensor], writes: list[Tensor]) -> None:
    """A synchronisation, or a copy from or to the CPU."""
    if name == "aten::_local_scalar_dense" or (name in simulated_gpu.MOVES and not (reads and writes)):
        raise RuntimeError(f"operation not permitted when stream is capturing: {name}")


@contextmanager
def capturing(_: object) -> Iterator[None]:
    simulated_gpu.LAUNCHES.append(refuse)
    try:
        yield
    finally:
        simulated_gpu.LAUNCHES.remove(refuse)


def main() -> None:
    steps = load_script("benchmarks/gpu_steps")
    setting = steps.Setting(device="cuda:0", **steps.SCALES["tiny"])
    machine.SIZE["cuda"], machine.COPY_BYTES["cuda"], throughput.ROOF_SIZE["cuda"] = 64, 2**10, 64
    graph = SimpleNamespace(replay=lambda: REPLAYED.append("graph"))
    with simulated_gpu.simulated_gpu(), Watch().watching(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "CUDAGraph", lambda: graph)
        patched.setattr(torch.cuda, "graph", capturing)
        for name in sys.argv[1:] or steps.STEPS:
            for part in steps.STEPS[name](setting):
                if not part.name.startswith(LEFT_OUT):
                    found = part.measure(5.0)
                    print(f"{name}: {part.name}: {', '.join(steps.headline(found))}", flush=True)
    print(f"{len(REPLAYED)} replays")


if __name__ == "__main__":
    main()
