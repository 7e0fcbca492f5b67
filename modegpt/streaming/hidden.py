"""Hidden states of many batches in front of one layer, in memory or on disk."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modegpt.calibration.stream import HiddenStates, embed
from modegpt.files import replacing
from modegpt.streaming.model import StreamedModel


class DiskBatches(Sequence):
    """A list of batches on disk: writes go to ``target``, reads come from there, or else from ``source``."""

    def __init__(self, source: Path | None, target: Path, count: int, device: torch.device) -> None:
        self.source, self.target, self.count, self.device = source, target, count, device
        target.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.count:
            raise IndexError(index)
        written = batch_path(self.target, index)
        path = written if written.exists() or self.source is None else batch_path(self.source, index)
        return load_file(path)["hidden"].to(self.device)

    def __setitem__(self, index: int, value: Tensor) -> None:
        write_batch(self.target, index, value)

    def turned(self, target: Path) -> "DiskBatches":
        """What was written here, as the source of the next layer's, written to ``target``."""
        return DiskBatches(self.target, target, self.count, self.device)


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
    batches = [None] * num_batches if directory is None else DiskBatches(None, directory, num_batches, streamed.device)
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
