"""Whether the files of a checkpoint are whole, and what identifies its weights."""

import hashlib
import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modegpt.decompositions.linalg import all_finite
from modegpt.errors import UserError, shortened
from modegpt.files import LARGEST_BYTES, read_json

MANIFEST = "modegpt_manifest.json"
OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files that hold one JSON object."""
SIZES = (
    "hidden_size",
    "intermediate_size",
    "ffn_dim",
    "word_embed_proj_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
"""Fields of a configuration that count something."""
COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MOST = 10_000
"""Of each of ``COUNTS``: Transformers makes a module for every layer before it looks at the weights."""
UNSEALED = frozenset({MANIFEST, "README.md"})
"""Files outside the manifest: itself, and the model card, which people edit."""
LONGEST_HEADER_BYTES = 100_000_000
"""Of a safetensors file, by the format."""
SAMPLED = 1021
DECISIVE = frozenset({".safetensors", ".bin", ".json", ".py"})
"""Endings of files that can change what is loaded, so that one beside the manifest's is refused."""


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and sha256 of every sealed file in ``directory``, by name."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name not in UNSEALED)
    return {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in files}


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(directory: Path) -> None:
    """Refuse a damaged checkpoint.

    Its files are checked against its manifest; without one, the lengths of its safetensors files are.

    Raises:
        UserError: a file that is missing, truncated, changed, or does not belong; the file is named.
    """
    sealed = (directory / MANIFEST).is_file()
    if sealed:  # first: it tells a truncated file from one that was written so
        _check_manifest(directory)
    for path in sorted(directory.glob("*.json")):
        _check_regular(path)
        if path.stat().st_size > LARGEST_BYTES:
            raise UserError(f"{path} is damaged: it has {path.stat().st_size} bytes")
    for name in OBJECTS:
        if (directory / name).is_file() and not isinstance(read_json(directory / name), dict):
            raise UserError(f"{directory / name} is damaged: it is no JSON object")
    if not sealed:
        _check_shards(directory)


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse values of a configuration that Transformers would stumble over. Raises UserError naming the field."""

    def refuse(field: str, wanted: str) -> UserError:
        return UserError(f"{where}: config.json has {field}={config[field]!r:.80}; {wanted}")

    for field in SIZES:
        if wanted := _size_problem(field, config.get(field)):
            raise refuse(field, wanted)
    for field in ("dtype", "torch_dtype"):
        dtype = config.get(field)
        if dtype is not None and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
            raise refuse(field, "it must be a type of PyTorch, such as float32")
    for field in ("hidden_act", "hidden_activation", "activation_function"):
        if config.get(field) is not None and str(config[field]) not in ACT2FN:
            raise refuse(field, "Transformers knows no such activation function")
    for field in ("rope_parameters", "rope_scaling"):
        if wanted := _rope_problem(config.get(field)):
            raise refuse(field, wanted)


def _size_problem(field: str, size: Any) -> str | None:
    """What a count should be and is not."""
    if size is not None and (type(size) is not int or size < 1):
        return "it must be a whole number, 1 or more"
    return f"it must be at most {MOST}" if field in COUNTS and size is not None and size > MOST else None


def _rope_problem(rope: Any) -> str | None:
    """What the description of rotary positions should be and is not."""
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if rope is not None and kind not in ("default", *ROPE_INIT_FUNCTIONS, "su"):  # what longrope was called once
        return f"its rope_type must be one of default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}"
    for name in ("rope_theta", "factor"):
        value = rope.get(name) if isinstance(rope, dict) else None
        if value is not None and not (type(value) in (int, float) and 0 < value < math.inf):
            return f"its {name} must be a positive number"
    return None


def _check_manifest(directory: Path) -> None:
    manifest = read_json(directory / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UserError(f"{directory / MANIFEST} is damaged: it has no list of files; save the checkpoint again")
    for name, described in manifest["files"].items():
        if not isinstance(described, dict) or not described.keys() >= {"size", "sha256"}:
            raise UserError(
                f"{directory / MANIFEST} is damaged: {name} has no size and sha256; save the checkpoint again"
            )
    for name, described in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing: the checkpoint is incomplete; save or copy it again")
        size = path.stat().st_size
        if size != described["size"]:
            raise UserError(
                f"{path} has {size} bytes instead of {described['size']}: truncated or changed; save or copy it again"
            )
        if sha256_of(path) != described["sha256"]:
            raise UserError(
                f"{path} is not the file that was saved (sha256 differs from {MANIFEST}); "
                "save or copy the checkpoint again"
            )
    for path in sorted(directory.iterdir()):
        if path.suffix in DECISIVE and path.name not in UNSEALED and path.name not in manifest["files"]:
            raise UserError(f"{path} does not belong to this checkpoint ({MANIFEST} does not list it); remove it")


def _check_shards(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise UserError(f"{index} is damaged: weight_map must name the file of each tensor")
        missing = sorted(set(shards.values()) - {path.name for path in directory.iterdir()})
        if missing:
            raise UserError(f"{directory / missing[0]} is missing: {index.name} lists it")
    shards = sorted(directory.glob("*.safetensors"))
    for path in shards:
        _check_length(path)
    for path in () if shards else sorted(directory.glob("pytorch_model*.bin")):
        _check_pickle(path)


def _check_pickle(path: Path) -> None:
    """PyTorch's old form: a pickle. It is read without its data, and nothing that it could name is run."""
    _check_regular(path)
    try:
        torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        held = f" ({named[1]})" if named else ""
        raise UserError(
            f"{path} is a pickle that holds more than tensors{held}, or no pickle at all; "
            "give the checkpoint as safetensors"
        ) from None
    except (RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({shortened(str(error), 100)}); give the checkpoint as safetensors"
        ) from None


def _check_regular(path: Path) -> None:
    """A pipe could be waited on for ever, a device read for ever. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} is no file")


def _check_length(path: Path) -> None:
    """A safetensors file is 8 bytes of header length, the header, and as many bytes as its furthest tensor ends at."""
    header_bytes, header = _header(path)
    try:
        ends = [int(entry["data_offsets"][1]) for entry in header.values()]
    except (AttributeError, TypeError, ValueError, LookupError):
        raise UserError(f"{path} is damaged: its header does not say where each tensor is") from None
    size, expected = path.stat().st_size, 8 + header_bytes + max(ends, default=0)
    if size != expected:
        raise UserError(f"{path} is truncated or damaged: {size} bytes instead of {expected}")


def stored_sizes(directory: Path) -> dict[str, list[int]]:
    """The size of every tensor in the safetensors files of ``directory``, by name, from their headers alone."""
    headers = [_header(path)[1] for path in sorted(directory.glob("*.safetensors"))]
    return {name: list(entry["shape"]) for header in headers for name, entry in header.items()}


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """How long the header of a safetensors file is, and what it says of each tensor. Raises UserError."""
    _check_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if header_bytes > LONGEST_HEADER_BYTES:
            raise UserError(
                f"{path} is damaged: its header would have {header_bytes} bytes; "
                f"the format's limit is {LONGEST_HEADER_BYTES}"
            )
        if 8 + header_bytes > size:
            raise UserError(f"{path} is truncated: {size} bytes do not hold its header")
        try:
            header = json.loads(file.read(header_bytes))
        except (ValueError, RecursionError):
            raise UserError(f"{path} is damaged: its header is not JSON") from None
    if not isinstance(header, dict):
        raise UserError(f"{path} is damaged: its header does not say where each tensor is")
    return header_bytes, {name: entry for name, entry in header.items() if name != "__metadata__"}


def check_finite(model: nn.Module) -> None:
    """Raises UserError naming the first weight that holds NaN or inf."""
    for name, tensor in weight_tensors(model):
        if tensor.is_floating_point():
            check_tensor_finite(name, tensor)


def check_tensor_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises UserError naming the weight when it holds NaN or inf."""
    if not all_finite(tensor):
        raise UserError(
            f"weight {name} holds NaN or inf; the checkpoint is damaged or its dtype too narrow "
            "(try model.dtype=float32)"
        )


def fingerprint_weights(model: nn.Module) -> str:
    """``fingerprint_tensors`` of the state dict."""
    return fingerprint_tensors(weight_tensors(model))


def fingerprint_sample(model: nn.Module) -> str:
    """``fingerprint_tensors`` of every ``SAMPLED``-th element: tells models of one run apart that round differently.

    A weight without data counts by its shape.
    """
    return fingerprint_tensors(
        (
            name,
            torch.tensor(tensor.shape)
            if tensor.is_meta
            else tensor.detach().flatten()[::SAMPLED].clone(memory_format=torch.contiguous_format),
        )
        for name, tensor in sorted(model.state_dict().items())
    )


def weight_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict in order of names.

    What a device map keeps off the devices is read when its turn comes, and let go of after it.
    """
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.is_meta:
            yield name, tensor
            continue
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        with align_module_device(module, "cpu"):
            yield name, getattr(module, own)


def fingerprint_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 over the names, shapes, dtypes and bytes of ``tensors``, given in order of names, on any device."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for chunk in _byte_chunks(tensor):
            digest.update(chunk)
    return digest.hexdigest()


def _byte_chunks(tensor: torch.Tensor, chunk_elements: int = 1 << 24) -> Iterator[memoryview]:
    for chunk in tensor.detach().reshape(-1).split(chunk_elements):
        yield memoryview(chunk.cpu().contiguous().view(torch.uint8).numpy())
