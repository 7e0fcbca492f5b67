"""Compressed models of every family and of every form that a layer may have, on vocabularies of the embedded model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from modegpt.models import LayerShape, build_compressed, decoder_layers, dense_shape
from tests.models.family_table import CONFIGS, dense_model, sliced_model, smaller_shape, with_shared_pairs

VOCABULARY = {"vocab_size": 1536}


def of_family(name: str, *, query_key: bool = True, **changes) -> PreTrainedModel:
    """Layers of two widths, all head sizes smaller, those of queries and keys if ``query_key``."""
    dense = dense_model(name, **VOCABULARY, **changes)
    smaller = smaller_shape(dense.config)
    if not query_key:
        smaller = dataclasses.replace(smaller, qk_head_dim=dense_shape(dense.config).qk_head_dim)
    shapes = [smaller, dataclasses.replace(smaller, intermediate_size=17, v_head_dim=3), smaller]
    cut = [sliced_model(dense, shape)[0] for shape in shapes]
    tensors = [decoder_layers(each)[index].state_dict() for index, each in enumerate(cut)]
    return build_compressed(dense, shapes, tensors)


def _with_layer(shape: LayerShape, tensors: dict[str, torch.Tensor], dense: PreTrainedModel) -> PreTrainedModel:
    full = dense_shape(dense.config)
    return build_compressed(dense, [full, shape, full], [{}, tensors, {}])


def without_attention_and_mlp(*, constants: bool, **changes) -> PreTrainedModel:
    """The middle layer has neither, and what is left of them is a constant, or nothing."""
    dense = dense_model("llama", **VOCABULARY, **changes)
    tensors = dict(decoder_layers(dense)[1].state_dict())
    for key in [key for key in tensors if key.startswith(("self_attn.", "mlp."))]:
        tensors[key] = tensors[key][:, :0] if key.split(".")[1] in ("o_proj", "down_proj") else tensors[key][:0]
    paths = ("self_attn.o_proj", "mlp.down_proj") if constants else ()
    tensors |= {f"{path}.bias": torch.randn(dense.config.hidden_size) for path in paths}
    shape = dataclasses.replace(dense_shape(dense.config), num_kv_heads=0, intermediate_size=0, extra_biases=paths)
    return _with_layer(shape, tensors, dense)


def low_rank(**changes) -> PreTrainedModel:
    """Maps of the middle layer are two factors, in attention and in the MLP."""
    dense = dense_model("llama", **VOCABULARY, **changes)
    ranks = {"self_attn.q_proj": 6, "mlp.up_proj": 5, "mlp.down_proj": 7}
    tensors = dict(decoder_layers(dense)[1].state_dict())
    for path, rank in ranks.items():
        weight = tensors.pop(f"{path}.weight")
        tensors[f"{path}.A.weight"] = 0.2 * torch.randn(rank, weight.shape[1])
        tensors[f"{path}.B.weight"] = 0.2 * torch.randn(weight.shape[0], rank)
    return _with_layer(dataclasses.replace(dense_shape(dense.config), linear_ranks=ranks), tensors, dense)


FORMS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    name: (of_family, {"name": name}) for name in CONFIGS
} | {
    "empty layer": (without_attention_and_mlp, {"constants": False}),
    "constant layer": (without_attention_and_mlp, {"constants": True}),
    "low rank": (low_rank, {}),
    "shared heads": (with_shared_pairs, {"name": "llama", "head_dim": 40, "size": 32, **VOCABULARY}),
}
"""What makes each form, and its arguments."""


def with_heads_of_32(name: str) -> dict[str, int]:
    """What else a form is made with, so that its heads have the least size that vLLM's attention knows on a CPU."""
    if name == "shared heads":
        return {}
    stated = hasattr(CONFIGS.get(name, CONFIGS["llama"]), "head_dim")
    return {"hidden_size": 128} | ({"head_dim": 32} if stated else {})
