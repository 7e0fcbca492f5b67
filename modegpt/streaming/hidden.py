"""Hidden states of many batches in front of one layer, in memory or on disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modegpt.calibration.stream import HiddenStates, embed
from modegpt.files import replacing
from modegpt.streaming.model import StreamedModel


class DiskBatches:
    """A list of batches on disk: writes go to ``target``, reads come from there, or else from ``source``."""

    def __init__(self, source: Path | None, target: Path, num_batches: int, device: torch.device) -> None:
        self.source, self.target, self.num_batches, self.device = source, target, num_batches, device
        target.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(self.num_batches))

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.num_batches:
            raise IndexError(index)
        written = batch_path(self.target, index)
        path = written if written.exists() or self.source is None else batch_path(self.source, index)
        return load_file(path)["hidden"].to(self.device)

    def __setitem__(self, index: int, value: Tensor) -> None:
        write_batch(self.target, index, value)

    def turned(self, target: Path) -> "DiskBatches":
        """What was written here, as the source of the next layer's, written to ``target``."""
        return DiskBatches(self.target, target, self.num_batches, self.device)

    def as_list(self) -> list[Tensor]:
        """Itself, for ``HiddenStates``, which only counts, reads and replaces members of its list."""
        return cast("list[Tensor]", self)


def batch_path(directory: Path, index: int) -> Path:
    """Where batch ``index`` lies."""
    return directory / f"batch-{index:05d}.safetensors"


def write_batch(directory: Path, index: int, value: Tensor) -> None:
    """Write one batch; it is not there under its name before it is whole and on the disk."""
    with replacing(batch_path(directory, index)) as temporary:
        save_file({"hidden": value.cpu().contiguous()}, temporary)


def embedded(streamed: StreamedModel, tokens: Tensor, *, batch_size: int, directory: Path | None) -> HiddenStates:
    """The batches of ``tokens`` (num_samples, sequence_length) in front of layer 0, in memory or in ``directory``."""
    num_batches = -(-len(tokens) // batch_size)
    batches = [torch.empty(0)] * num_batches
    if directory is not None:
        batches = DiskBatches(None, directory, num_batches, streamed.device).as_list()
    arguments: list[dict] = [{} for _ in range(streamed.model.config.num_hidden_layers)]
    with streamed.outer(head=False) as model:
        for index, chunk in enumerate(tokens.split(batch_size)):
            part = embed(model, chunk, batch_size=batch_size)
            batches[index] = part.batches[0]
            for known, new in zip(arguments, part.arguments, strict=True):
                for size, values in new.items():
                    known.setdefault(size, values)
    return HiddenStates(batches=batches, arguments=arguments)


def arguments_alone(streamed: StreamedModel, tokens: Tensor, *, batch_size: int) -> list[dict]:
    """The arguments of each layer beside the hidden states, by batch size (see ``HiddenStates.arguments``)."""
    arguments: list[dict] = [{} for _ in range(streamed.model.config.num_hidden_layers)]
    with streamed.outer(head=False) as model:
        for chunk in {len(chunk): chunk for chunk in tokens.split(batch_size)}.values():
            for known, new in zip(arguments, embed(model, chunk, batch_size=batch_size).arguments, strict=True):
                known.update(new)
    return arguments
