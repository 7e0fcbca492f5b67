"""Models in GGUF files, read by Transformers' own loader: weights are what the file's quantised blocks stand for."""

import copy
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from modegpt.errors import UserError
from modegpt.models.build import restore_buffers

SUFFIX = ".gguf"
MAGIC = b"GGUF"


def gguf_file(path: str) -> dict[str, str]:
    """What Transformers' loaders are told beside the folder of ``path``: the name of the file, if it is one of GGUF."""
    return {"gguf_file": Path(path).name} if path.endswith(SUFFIX) else {}


def check_gguf(file: Path) -> None:
    """Raise UserError where ``file`` cannot be read as GGUF."""
    if not file.is_file():
        raise UserError(f"no GGUF file at {file}")
    if find_spec("gguf") is None:
        raise UserError("reading GGUF files needs the package gguf: pip install gguf")
    try:
        with file.open("rb") as stream:
            begins = stream.read(len(MAGIC))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    if begins != MAGIC:
        raise UserError(f"{file} is not a GGUF file: it does not begin with {MAGIC.decode()}")


def config_in(file: Path) -> dict[str, Any]:
    """What the header of ``file`` says of the model's configuration, by Transformers' loader.

    That takes a minute where the vocabulary is large, so what was read last is remembered while the file is the same.
    """
    known = file.stat()
    return copy.deepcopy(_config_in(file.resolve(), known.st_mtime_ns, known.st_size))


@lru_cache(maxsize=1)
def _config_in(file: Path, modified_ns: int, num_bytes: int) -> dict[str, Any]:
    written, _ = PreTrainedConfig.get_config_dict(str(file.parent), gguf_file=file.name)
    return written


def without_quantisation(loaded: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model with the tensors of ``loaded``, which Transformers takes for a quantised one."""
    config: Any = loaded.config
    vars(config).pop("quantization_config", None)  # of the file, not of these weights; Transformers 5.16 sets none
    with torch.device("meta"):
        model = type(loaded)(config)
    model.generation_config = loaded.generation_config
    model.load_state_dict(loaded.state_dict(), strict=False, assign=True)  # tied weights are there once
    model.tie_weights()
    restore_buffers(model, loaded)
    assert not any(tensor.is_meta for tensor in model.state_dict().values()), "a tensor of the file was lost"
    return model
