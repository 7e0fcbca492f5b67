"""Streams of the simulated GPU, and what would race on them: PyTorch's own sanitizer is told who reads, writes, waits.

It sees kernels of two streams on one tensor without a wait between them. Also seen is a tensor of one stream that is
used on another while the allocator is not told (``record_stream``): its memory could be given away too early.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.cuda._sanitizer import EventHandler

from modegpt.calibration import statistics
from modegpt.calibration.calibration import Calibration
from modegpt.data.tokens import CalibrationTokens
from modegpt.models.checkpoints import load_model
from modegpt.progress import Progress
from tests import simulated_gpu
from tests.simulated_gpu import GPU, OnGpu

PLACES = (
    "query_key.C_Q",
    "query_key.C_K",
    "value_output.G",
    "value_output.mean",
    "mlp.C",
    "mlp.mean",
    "layer.influence",
)


class Stream:
    """Queues nothing, as all operations run at once; knows whom it waited for."""

    device = GPU

    def __init__(self, watch: "Watch") -> None:
        self.watch = watch
        self.number = len(watch.streams)
        watch.streams.append(self)
        watch.handler._handle_stream_creation(self.number)

    def wait_stream(self, other: "Stream") -> None:
        self.watch.event += 1
        self.watch.handler._handle_event_creation(self.watch.event)
        self.watch.handler._handle_event_record(self.watch.event, other.number)
        self.watch.handler._handle_event_wait(self.watch.event, self.number)


class Watch:
    """Collects ``races``, and the shapes of tensors ``lent`` to another stream without telling the allocator."""

    def __init__(self) -> None:
        self.handler, self.event = EventHandler(), 0
        self.races: list[Any] = []
        self.streams: list[Stream] = []
        self.current = Stream(self)
        self.owner: dict[int, int] = {}
        self.alive: list[Any] = []  # no address comes twice
        self.known: set[tuple[int, int]] = set()
        self.used: dict[tuple[int, int], tuple[int, ...]] = {}

    def launched(self, name: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        places = [{self.place(each) for each in tensors} for tensors in (reads, writes)]
        reads_only, written = places[0] - places[1], places[1]
        names = {place: [""] for place in reads_only | written}
        self.races += self.handler._handle_kernel_launch(self.current.number, reads_only, written, set(), name, names)
        for each in (*reads, *writes):
            if self.owner[self.place(each)] != self.current.number:
                self.used[self.place(each), self.current.number] = tuple(each.shape)

    def place(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.owner:
            self.alive.append(storage)
            self.owner[storage._cdata] = self.current.number
            self.handler._handle_memory_allocation(storage._cdata)
        return storage._cdata

    @property
    def lent(self) -> list[tuple[int, ...]]:
        return [shape for use, shape in self.used.items() if use not in self.known]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def watching(self) -> Iterator["Watch"]:
        def record(tensor: OnGpu, stream: Stream) -> None:
            self.known.add((self.place(tensor), stream.number))

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch.cuda, "Stream", lambda _: Stream(self))
            patched.setattr(torch.cuda, "stream", self.on)
            patched.setattr(torch.cuda, "current_stream", lambda _: self.current)
            patched.setattr(OnGpu, "record_stream", record, raising=False)
            patched.setattr(simulated_gpu, "LAUNCHES", [self.launched])
            yield self


def observed(*, overlap: bool) -> tuple[list[dict[str, Tensor]], Watch]:
    """The statistics of every layer of an embedded model, and who raced."""
    watch = Watch()
    with simulated_gpu.simulated_gpu():
        model = load_model("embedded:tiny-llama", device="cuda:0")
        ids = torch.arange(6 * 32).view(6, 32) % 200
        with watch.watching() if overlap else nullcontext():
            calibration = Calibration(
                model,
                CalibrationTokens(ids, "", ids.numel()),
                batch_size=2,
                progress=Progress(True),
                overlap=overlap,
            )
            layers = list(calibration.statistics(frozenset(PLACES)))
        found = [
            {name: value.held if isinstance(value, OnGpu) else value for name, value in layer.items()}
            for layer in layers
        ]
    return found, watch


def main() -> None:
    """A line with the safeguards: same bits, races, what was lent; then one without each of them."""
    plain, _ = observed(overlap=False)
    beside, watch = observed(overlap=True)
    equal = all(torch.equal(one[name], other[name]) for one, other in zip(plain, beside, strict=True) for name in one)
    kept = {tuple(moment.shape) for moment in plain[0].values()}
    lent = [shape for shape in watch.lent if shape not in kept and shape[1:] not in kept]
    print(f"equal={equal} streams={len(watch.streams)} races={len(watch.races)} lent={len(lent)}")
    waits = Stream.wait_stream
    for deaf, name in enumerate(("forward", "sums")):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                Stream, "wait_stream", lambda one, other, deaf=deaf: one.number == deaf or waits(one, other)
            )
            print(f"{name} not waiting: races={len(observed(overlap=True)[1].races) > 0}")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(statistics, "beside", _without_record)
        more = observed(overlap=True)[1].lent
        print(f"memory not lent: seen={len(more) > len(watch.lent)}")


@contextmanager
def _without_record(stream: Stream, _: Tensor) -> Iterator[None]:
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield


if __name__ == "__main__":
    main()
