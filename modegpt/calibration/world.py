"""Several processes, one calibration: each sees its share of the windows, and sums are pooled layer by layer.

Second moments are sums over tokens. ``pool`` adds those of all processes at the end of a layer, once, so they differ
from a single process's by the order of float64 additions. ``add`` adds batch by batch, in the order of one process, to
the same bits, at the price of sending every product once. All processes then have the same statistics, and divide or
repeat what is made of them; the first one scores and records.
"""

import io
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from modegpt.errors import UserError

Item = TypeVar("Item")

PATIENCE = timedelta(days=7)
"""How long a process waits for another: the first one scores the dense model while the others wait at layer 0."""


@dataclass(frozen=True)
class World:
    """The processes of one run: this one's ``rank`` among ``size``, and the same on its own machine.

    By default a process is alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that scores, records and prints."""
        return self.rank == 0

    def device(self, device: str) -> str:
        """The device of this process: its own GPU where ``device`` is any GPU."""
        return f"cuda:{self.local_rank}" if device == "cuda" and self.size > 1 else device

    def share(self, items: Sequence[Item], what: str, *, even: bool = False) -> list[Item]:
        """Every ``size``-th of ``items`` from the ``rank``-th on.

        ``even``: where others have one more, the process's first one again. Raises UserError when a process would have
        none.
        """
        if len(items) < self.size:
            raise UserError(
                f"{self.size} processes cannot share {len(items)} {what}; start fewer, or set a smaller "
                "calibration.batch_size or more calibration.num_samples"
            )
        mine = list(items[self.rank :: self.size])
        return mine + mine[:1] if even and len(mine) * self.size < len(items) else mine

    def pool(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of ``tensors`` (float64, on one device) by its sum over all processes: one all-reduce."""
        if self.size > 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            distributed.all_reduce(flat)
            for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def add(self, total: Tensor, mine: Tensor) -> None:
        """``total += mine`` for what every process calls ``mine``, in the order of ranks, so that sums over batches,
        which go round the processes, are added up as one process would: to the same bits.

        A process adds up its own rows of ``total`` alone; the others stay zero until ``pool`` brings all together,
        which is exact. Sends ``mine`` once.
        """
        if self.size == 1:
            total += mine
            return
        rows = total if total.ndim else total.view(1)
        bounds = [len(rows) * rank // self.size for rank in range(self.size + 1)]
        counts = [stop - start for start, stop in itertools.pairwise(bounds)]
        own = rows[bounds[self.rank] : bounds[self.rank + 1]]
        received = own.new_empty(self.size, *own.shape)
        sent = mine.to(rows.dtype).reshape(rows.shape).contiguous()  # what is added may be narrower, in some processes
        distributed.all_to_all_single(received.flatten(0, 1), sent, [len(own)] * self.size, counts)
        for of_one in received:
            own += of_one

    def in_order(self, mine: Iterable[Item], device: str | torch.device) -> Iterable[Item]:
        """The items of all processes, their tensors on ``device``, in the order that ``share`` took them from."""
        if self.size == 1:
            return mine
        buffer = io.BytesIO()
        torch.save(list(mine), buffer)
        of_each = self._exchanged(buffer, device)
        return [items[place] for place in range(len(of_each[0])) for items in of_each if place < len(items)]

    def divided(self, jobs: Iterable[Callable[[], Item]], device: str | torch.device) -> list[Item]:
        """What each of ``jobs`` returns, in order, its tensors on ``device``; one process does it and sends it to all.

        A process keeps its own of every ``size`` jobs and does it when all of these are there, so that all work at the
        same time. Raises, in every process, what the first of the jobs to fail raised, if that is a UserError.
        """
        if self.size == 1:
            return [job() for job in jobs]
        results: list[Item] = []
        mine: list[Callable[[], Item]] = []
        number = -1
        for number, job in enumerate(jobs):
            if number % self.size == self.rank:
                mine.append(job)
            del job  # or what it holds would live on
            if number % self.size == self.size - 1:
                results += self._done(mine, device)
        if (number + 1) % self.size:
            results += self._done(mine, device)
        return results

    def _done(self, mine: list[Callable[[], Item]], device: str | torch.device) -> list[Item]:
        """Do the one job in ``mine``, if there is one, and empty the list; what every process did, by rank."""
        buffer = io.BytesIO()
        try:
            torch.save([job() for job in mine], buffer)
        except UserError as error:
            torch.save(error, buffer)
        mine.clear()
        done = self._exchanged(buffer, device)
        for each in done:
            if isinstance(each, UserError):
                raise each
        return [result for each in done for result in each]

    def _exchanged(self, mine: io.BytesIO, device: str | torch.device) -> list[Any]:
        """What ``torch.save`` wrote to every process's buffer, by rank."""
        sent: list[Any] = [None] * self.size
        distributed.all_gather_object(sent, mine.getvalue())
        return [torch.load(io.BytesIO(each), map_location=device, weights_only=False) for each in sent]

    def told(self, value: Any) -> Any:
        """Broadcast the first process's ``value`` to all."""
        values = [value]
        if self.size > 1:
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def meet(self) -> None:
        """Wait until all processes have come so far."""
        if self.size > 1:
            distributed.barrier()

    def leave(self) -> None:
        """Part from the other processes, when nothing is left to pool."""
        if self.size > 1:
            distributed.destroy_process_group()


ALONE = World()
"""One process has all the windows."""


def join_world(device: str, *, what: str = "this run", shared: bool = True) -> World:
    """Meet the processes that ``torchrun`` started, over NCCL for GPUs and Gloo otherwise; without torchrun, be alone.

    Raises UserError where there are several though ``what`` cannot be ``shared``.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if size == 1:
        return ALONE
    if not shared:
        raise UserError(f"{what} cannot share its calibration among {size} processes; start it without torchrun")
    world = World(
        rank=int(os.environ["RANK"]),
        size=size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_size=int(os.environ["LOCAL_WORLD_SIZE"]),
    )
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    return world
