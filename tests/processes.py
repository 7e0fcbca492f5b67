"""Processes that a test starts, measures or kills: children of one that has run nothing.

A child of the test process itself would have its locks and its memory, and none of the threads that hold or serve them.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from modegpt.calibration.world import World, join_world

CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["torch", "transformers", "modegpt.run"])

STUCK_SECONDS = 3600
"""What waits for a process waits for its end, not for a time: only one that is stuck for good takes so long."""


def joined(rank: int, size: int, port: int) -> World:
    """A process as torchrun starts it, among the others."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(size)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return join_world("cpu")


def ended_well(processes: Sequence[BaseProcess]) -> None:
    """Start ``processes`` and wait until all have ended, without an error."""
    for process in processes:
        process.start()
    for process in processes:
        process.join(STUCK_SECONDS)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def together(size: int, work: Callable[[int, int, Path], object], folder: Path) -> None:
    """Start ``size`` processes that meet at a port, each doing ``work(rank, port, folder)``, and wait for their end."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ended_well([CLEAN.Process(target=work, args=(rank, store.port, folder)) for rank in range(size)])


def killed_when(owner: object, name: str, moment: Callable[..., bool], *, after: bool) -> None:
    """Patch ``owner.name`` to kill this process at the call for which ``moment`` is true, before it or ``after`` it."""
    original = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        due = moment(*args, **kwargs)
        result = original(*args, **kwargs) if after or not due else None
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)
