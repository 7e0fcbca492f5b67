"""Several processes, one calibration: each sees its share of the windows, and sums are pooled layer by layer.

Second moments and influence are sums over tokens, so the pooled ones differ from a single process's only by the
order of float64 additions. All processes then have the same statistics, and divide the layers that are decomposed on
them; the first one scores and records.
"""

import io
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
    """The processes of one run: this one's ``rank`` among ``size``, and its rank on its own machine.

    By default a process is alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process is the one that scores, records and prints."""
        return self.rank == 0

    def device(self, device: str) -> str:
        """The device of this process: its own GPU where ``device`` is any GPU."""
        return f"cuda:{self.local_rank}" if device == "cuda" and self.size > 1 else device

    def share(self, items: Sequence[Item], what: str) -> list[Item]:
        """Every ``size``-th of ``items`` from the ``rank``-th on. Raises UserError when a process would have none."""
        if len(items) < self.size:
            raise UserError(
                f"{self.size} processes cannot share {len(items)} {what}; start fewer, or set a smaller "
                "calibration.batch_size or more calibration.num_samples"
            )
        return list(items[self.rank :: self.size])

    def pool(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of ``tensors`` (float64, on one device) by its sum over all processes: one all-reduce."""
        if self.size > 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            distributed.all_reduce(flat)
            for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))

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
                results += self._exchanged(mine, device)
        if (number + 1) % self.size:
            results += self._exchanged(mine, device)
        return results

    def _exchanged(self, mine: list[Callable[[], Item]], device: str | torch.device) -> list[Item]:
        """Do the one job in ``mine``, if there is one, and empty the list; what every process did, by rank."""
        buffer = io.BytesIO()
        try:
            torch.save([job() for job in mine], buffer)
        except UserError as error:
            torch.save(error, buffer)
        mine.clear()
        sent: list[Any] = [None] * self.size
        distributed.all_gather_object(sent, buffer.getvalue())
        done = [torch.load(io.BytesIO(each), map_location=device, weights_only=False) for each in sent]
        for each in done:
            if isinstance(each, UserError):
                raise each
        return [result for each in done for result in each]

    def told(self, value: Any) -> Any:
        """Broadcast the first process's ``value`` to all."""
        values = [value]
        if self.size > 1:
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def leave(self) -> None:
        """Part from the other processes, when nothing is left to pool."""
        if self.size > 1:
            distributed.destroy_process_group()


def join_world(device: str, *, what: str = "this run", shared: bool = True) -> World:
    """Meet the processes that ``torchrun`` started, over NCCL for GPUs and Gloo otherwise; without torchrun, be alone.

    Raises UserError where there are several though ``what`` cannot be ``shared``.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if size == 1:
        return World()
    if not shared:
        raise UserError(f"{what} cannot share its calibration among {size} processes; start it without torchrun")
    world = World(rank=int(os.environ["RANK"]), size=size, local_rank=int(os.environ["LOCAL_RANK"]))
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    return world
