"""Hidden states of many batches between layers, in memory or on disk, and layers that are on disk."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from modegpt.calibration.stream import HiddenStates, Storage
from modegpt.cost.metering import CostMeter
from modegpt.files import replacing
from modegpt.streaming.model import StreamedModel


class DiskBatches:
    """A list of batches on disk: writes go to ``target``, reads come from there, or else from ``source``."""

    def __init__(
        self, target: Path, device: torch.device, *, num_batches: int = 0, source: "DiskBatches | None" = None
    ) -> None:
        self.target, self.device, self.num_batches, self.source = target, device, num_batches, source
        target.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(self.num_batches))

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.num_batches:
            raise IndexError(index)
        path = batch_path(self.target, index)
        if self.source is not None and not path.exists():
            return self.source[index]
        return load_file(path)["hidden"].to(self.device)

    def __setitem__(self, index: int, value: Tensor) -> None:
        write_batch(self.target, index, value)

    def append(self, value: Tensor) -> None:
        """One batch more."""
        self[self.num_batches] = value
        self.num_batches += 1

    def turned(self, target: Path) -> "DiskBatches":
        """What was written here, as the source of the next layer's, written to ``target``."""
        self.source = None
        return DiskBatches(target, self.device, num_batches=self.num_batches, source=self)

    def as_list(self) -> list[Tensor]:
        """Itself, for who only counts, appends, reads and replaces members of its list."""
        return cast("list[Tensor]", self)


def batch_path(directory: Path, index: int) -> Path:
    """Where batch ``index`` lies."""
    return directory / f"batch-{index:05d}.safetensors"


def write_batch(directory: Path, index: int, value: Tensor) -> None:
    """Write one batch; it is not there under its name before it is whole and on the disk."""
    with replacing(batch_path(directory, index)) as temporary:
        save_file({"hidden": value.cpu().contiguous()}, temporary)


@dataclass
class DiskStorage(Storage):
    """Layers are on disk, and hidden states in files where there is a ``directory`` for them.

    What is in it at first is of another process, and goes. Reading and embedding are stages of ``meter``.
    """

    streamed: StreamedModel
    meter: CostMeter = field(default_factory=CostMeter)
    directory: Path | None = None

    def __post_init__(self) -> None:
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Layer ``index``, loaded; only the loading is metered."""
        with ExitStack() as stack:
            with self.meter.stage("reading"):
                layer = stack.enter_context(self.streamed.layer(index))
            yield layer

    def outer(self, *, head: bool) -> AbstractContextManager[PreTrainedModel]:
        """The model with everything but its layers loaded."""
        return self.streamed.outer(head=head)

    def batches(self) -> list[Tensor]:
        """In memory, or in a folder that goes with the list."""
        if self.directory is None:
            return []
        batches = DiskBatches(Path(tempfile.mkdtemp(dir=self.directory)), self.streamed.device)
        weakref.finalize(batches, shutil.rmtree, batches.target, ignore_errors=True)
        return batches.as_list()

    def embed(self, tokens: Tensor, *, batch_size: int) -> HiddenStates:
        """``tokens`` in front of layer 0."""
        with self.meter.stage("embedding"):
            return super().embed(tokens, batch_size=batch_size)
