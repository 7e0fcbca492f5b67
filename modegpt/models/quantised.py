"""Weights of 8 or 4 bits in an exported checkpoint, as compressed-tensors stores them: Transformers and vLLM load it.

Rounding to nearest, without data. Embeddings, head, norms and biases stay as they are.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modegpt.errors import UserError

BITS = {"int8": 8, "int4": 4}
GROUP = 32
"""Entries of a row that share a scale at 4 bits; at 8 bits it is the row."""
SHRINKS = tuple(1 - step / 40 for step in range(13))
"""Of the scale that the largest entry asks for; each group takes the one with the least squared error."""


def described(kind: str) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint: 4-bit weights alone, or 8 bits for weights and for states."""
    weights = {"num_bits": BITS[kind], "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "channel"} if kind == "int8" else {"strategy": "group", "group_size": GROUP}
    states = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    form = "int-quantized" if kind == "int8" else "pack-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": states if kind == "int8" else None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def quantised(tensors: Mapping[str, Tensor], kind: str, *, layers: str) -> dict[str, Tensor]:
    """``tensors`` with the matrices inside the decoder layers, at the path ``layers``, stored as ``kind``.

    Raises:
        UserError: a matrix whose rows are no multiple of 32, at 4 bits; or the stacked matrices of experts.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        inside = name.startswith(f"{layers}.") and "norm" not in name
        if inside and tensor.ndim > 2:
            raise UserError(f"{name} holds the matrices of all experts, which have no quantised form here")
        if not (inside and name.endswith(".weight") and tensor.ndim == 2):
            stored[name] = tensor
        elif kind == "int8":
            q, scale = rounded(tensor, bits=8, group=tensor.shape[1])
            stored |= {name: q.to(torch.int8), f"{name}_scale": scale.to(tensor.dtype)}
        else:
            if tensor.shape[1] % GROUP:
                raise UserError(
                    f"{name} has rows of {tensor.shape[1]}, and 4 bits want a multiple of {GROUP}; compress with "
                    "engine=gguf, or export with --width-multiple 32"
                )
            q, scale = rounded(tensor, bits=4, group=GROUP)
            stored |= {f"{name}_packed": packed(q), f"{name}_scale": scale.to(tensor.dtype)}
            stored[f"{name}_shape"] = torch.tensor(tensor.shape)
    return stored


def rounded(matrix: Tensor, *, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Whole numbers (out, in) and scales (out, in / group) whose product is nearest to ``matrix``, float32."""
    x = matrix.float().unflatten(1, (-1, group))
    top = 2 ** (bits - 1) - 1
    full = (x.abs().amax(-1, keepdim=True) / top).clamp(min=torch.finfo(torch.float32).tiny)
    scale, least = full, torch.full_like(full, float("inf"))
    for shrink in SHRINKS:
        tried = (shrink * full).to(matrix.dtype).float()
        error = (x - tried * (x / tried).round().clamp(-top - 1, top)).square().sum(-1, keepdim=True)
        scale, least = torch.where(error < least, tried, scale), torch.minimum(error, least)
    q = (x / scale).round().clamp(-top - 1, top)
    return q.flatten(1), scale.squeeze(-1)


def packed(q: Tensor) -> Tensor:
    """Numbers of -8 .. 7 (out, in) as int32 (out, in / 8): each plus 8, the first in the lowest 4 bits."""
    nibbles = (q.to(torch.int64) + 8).unflatten(1, (-1, 8))
    words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
