"""The safetensors files of a checkpoint: tensors read one at a time, layers written one file each."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from modegpt.errors import UserError
from modegpt.files import read_json, replacing, write_text

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Shards:
    """Tensors of the checkpoint in ``directory`` by their stored names.

    Raises UserError when it has no safetensors weights.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if (directory / INDEX).is_file():
            self.files: dict[str, str] = read_json(directory / INDEX)["weight_map"]
        elif (directory / SINGLE).is_file():
            with safe_open(directory / SINGLE, framework="pt") as file:
                self.files = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise UserError(
                f"{directory} has no safetensors weights, which out-of-core compression reads; "
                "save the model again with save_pretrained"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The tensor ``name``, or ``rows`` of it, in memory of its own; the file's pages are let go."""
        with safe_open(self.directory / self.files[name], framework="pt") as file:
            return file.get_slice(name)[rows].clone()

    def shape(self, name: str) -> list[int]:
        """The size of ``name``, from its file's header."""
        with safe_open(self.directory / self.files[name], framework="pt") as file:
            return file.get_slice(name).get_shape()

    def dtype_of(self, name: str) -> str:
        """The safetensors dtype of ``name``, such as ``BF16``."""
        with safe_open(self.directory / self.files[name], framework="pt") as file:
            return file.get_slice(name).get_dtype()


def shard_name(index: int, count: int) -> str:
    """The usual name of shard ``index`` (from 0) of ``count``."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_shard(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one shard so that it is there whole or not at all, even after a power cut."""
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})


def write_index(directory: Path, num_parameters: int) -> None:
    """Write the index of the shards in ``directory``, in the form Transformers gives it."""
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for path in sorted(directory.glob("model-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        weight_map |= dict.fromkeys(names, path.name)
        total_bytes += sum(end - start for start, end in _offsets(path))
    index = {"metadata": {"total_parameters": num_parameters, "total_size": total_bytes}, "weight_map": weight_map}
    write_text(directory / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _offsets(path: Path) -> list[tuple[int, int]]:
    """Where each tensor of a safetensors file starts and ends, in bytes."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"]
