"""One row a family (and each of its forms that runs other code): a tiny configuration, made into a random model."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from modegpt.calibration.statistics import STATISTICS
from modegpt.decompositions.modules import ExpertWeights, HeadNorm, MLPWeights, QueryKeyWeights, ValueOutputWeights
from modegpt.models import (
    FAMILIES,
    Family,
    LayerShape,
    build_compressed,
    decoder_layers,
    dense_shape,
    family_of,
    layer_tensors,
    read_mlps,
    read_query_key,
    read_value_output,
    unfused,
)

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**SIZES, "intermediate_size": 40, "num_key_value_heads": 2}
OWN = {"opt": {"ffn_dim": 40, "dropout": 0.0}, "gemma": {"head_dim": 16}, "qwen3": {"head_dim": 16}}
OWN["gemma3_text"] = {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 6}
OWN["gemma3_text"]["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
OWN |= {name: {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2} for name in ("mixtral", "olmoe")}
OWN["qwen3_moe"] = OWN["olmoe"] | {"moe_intermediate_size": 40, "head_dim": 16}
OWN["smollm3"] = {"no_rope_layers": [1, 0, 1]}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The tiny form of a family, from the sizes that all have, as far as its configuration has a place for them."""
    fields = AutoConfig.for_model(model_type).to_dict()
    sizes = {name: value for name, value in (GROUPED | OWN.get(model_type, {})).items() if name in fields}
    return AutoConfig.for_model(model_type, **sizes)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}

CONFIGS = {
    **{name: tiny_config(name) for name in FAMILIES},
    "llama-multihead-biased": LlamaConfig(**{**GROUPED, "num_key_value_heads": 4}, attention_bias=True, mlp_bias=True),
    "llama3-rope-tied": LlamaConfig(**GROUPED, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-wide-heads": LlamaConfig(**GROUPED, head_dim=16),
    "mistral-no-window": MistralConfig(**GROUPED, sliding_window=None),
    "mistral-window": MistralConfig(**GROUPED, sliding_window=6),
    "qwen2-windows": Qwen2Config(**GROUPED, **WINDOWS),
    "opt-post-norm-projected": OPTConfig(
        **SIZES, ffn_dim=40, dropout=0.0, do_layer_norm_before=False, word_embed_proj_dim=16
    ),
}
"""Each family by its model type, and then its other forms."""
ONE_MLP = [name for name, config in CONFIGS.items() if family_of(config).experts_path is None]
"""Those without experts, which all methods can compress."""


def statistics_of(family: Family) -> frozenset[str]:
    """The statistics that a layer of ``family`` can be asked for."""
    absent: tuple[str, ...] = ("experts.",) if family.experts_path is None else ("mlp.",)
    absent += () if family.head_norms else ("query_key.N_",)
    return frozenset(name for name in STATISTICS if not name.startswith(absent))


def native_model(name: str, **changes) -> PreTrainedModel:
    """The family's own model with random weights, biases and norms, float32, eval mode."""
    config = CONFIGS[name]
    config = type(config)(**{**config.to_dict(), **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.generation_config.pad_token_id = 0
    return model


def dense_model(name: str, **changes) -> PreTrainedModel:
    """``native_model`` in the form in which it is compressed."""
    return unfused(native_model(name, **changes))


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


def typical_error(logits: Tensor, expected: Tensor) -> float:
    """Relative error of the median token of (batch, sequence, vocabulary); rounding sends a few to other experts."""
    return float(((logits.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@dataclass
class Selection:
    """Indices of what stays in a layer.

    Columns (n',) of its MLP, or of each expert; query-key pairs or columns (H_kv, r'); values (H_kv, v').
    """

    mlp: list[Tensor]
    query_key: Tensor
    rope_index: Tensor | None
    value: Tensor


def smaller_shape(config: PreTrainedConfig) -> LayerShape:
    """About 30 % less of everything that the family allows, with different query-key and value head sizes."""
    dense = dense_shape(config)
    return dataclasses.replace(
        dense, qk_head_dim=dense.qk_head_dim * 3 // 4, v_head_dim=dense.v_head_dim * 5 // 8, intermediate_size=28
    )


def random_selection(
    rotated: bool, dense: LayerShape, shape: LayerShape, generator: torch.Generator, num_mlps: int = 1
) -> Selection:
    def choose(size: int, count: int) -> Tensor:
        return torch.randperm(size, generator=generator)[:count].sort().values

    heads = range(dense.num_kv_heads)
    mlp = [choose(dense.intermediate_size, shape.intermediate_size) for _ in range(num_mlps)]
    value = torch.stack([choose(dense.v_head_dim, shape.v_head_dim) for _ in heads])
    if not rotated:
        return Selection(mlp, torch.stack([choose(dense.qk_head_dim, shape.qk_head_dim) for _ in heads]), None, value)
    half = dense.qk_head_dim // 2
    pairs = torch.stack([choose(half, shape.qk_head_dim // 2) for _ in heads])
    return Selection(mlp, torch.cat((pairs, pairs + half), dim=1), pairs, value)


def _take(tensor: Tensor | None, index: Tensor, dim: int) -> Tensor | None:
    """What ``index`` (H_kv, k) keeps along ``dim`` of per-head ``tensor``, a row for each query head of its group."""
    if tensor is None:
        return None
    index = index.repeat_interleave(tensor.shape[0] // index.shape[0], dim=0)
    return torch.take_along_dim(tensor, index if tensor.ndim == 2 else index.unsqueeze(3 - dim), dim)


def sliced_mlps(mlps: MLPWeights | ExpertWeights, selected: list[Tensor]) -> MLPWeights | ExpertWeights:
    if isinstance(mlps, ExpertWeights):
        return ExpertWeights(tuple(sliced_mlp(mlp, S) for mlp, S in zip(mlps.experts, selected, strict=True)))
    [S] = selected
    return sliced_mlp(mlps, S)


def sliced_mlp(mlp: MLPWeights, S: Tensor) -> MLPWeights:
    columns = {
        name: None if getattr(mlp, name) is None else getattr(mlp, name)[..., S]
        for name in ("W_U", "W_G", "b_U", "b_G")
    }
    return dataclasses.replace(mlp, W_D=mlp.W_D[S], **columns)


def sliced_query_key(weights: QueryKeyWeights, selection: Selection) -> QueryKeyWeights:
    """With the norms of heads, where there are any, over the dims that stay as if the others were zero."""
    W = {name: _take(getattr(weights, name), selection.query_key, 2) for name in ("W_Q", "W_K")}
    b = {name: _take(getattr(weights, name), selection.query_key, 1) for name in ("b_Q", "b_K")}
    norms = {
        name: HeadNorm(_take(norm.w, selection.query_key, 1), _take(norm.c, selection.query_key, 1), norm.eps)
        for name in ("norm_Q", "norm_K")
        if (norm := getattr(weights, name)) is not None
    }
    return dataclasses.replace(weights, rope_index=selection.rope_index, **W, **b, **norms)


def sliced_value_output(weights: ValueOutputWeights, S: Tensor) -> ValueOutputWeights:
    return dataclasses.replace(
        weights, W_V=_take(weights.W_V, S, 2), b_V=_take(weights.b_V, S, 1), W_O=_take(weights.W_O, S, 1)
    )


def sliced_layer(model: PreTrainedModel, index: int, shape: LayerShape, selection: Selection) -> dict[str, Tensor]:
    family, layer = family_of(model.config), decoder_layers(model)[index]
    query_key = read_query_key(family, layer)
    return layer_tensors(
        family,
        model.config,
        shape,
        mlp=sliced_mlps(read_mlps(family, layer), selection.mlp),
        query_key=sliced_query_key(query_key, selection),
        value_output=sliced_value_output(read_value_output(family, layer), selection.value),
    )


def sliced_model(
    model: PreTrainedModel, shape: LayerShape | None = None, seed: int = 0
) -> tuple[PreTrainedModel, list[Selection]]:
    """``model`` with random columns removed from every layer, and what was kept."""
    shape = smaller_shape(model.config) if shape is None else shape
    generator, family, dense = torch.Generator().manual_seed(seed), family_of(model.config), dense_shape(model.config)
    selections = [
        random_selection(family.rotates(layer), dense, shape, generator, len(family.downs(layer)))
        for layer in decoder_layers(model)
    ]
    tensors = [sliced_layer(model, index, shape, selection) for index, selection in enumerate(selections)]
    return build_compressed(model, [shape] * len(selections), tensors), selections


def with_shared_pairs(name: str, head_dim: int = 8, size: int = 6, **changes) -> PreTrainedModel:
    """Heads of ``size`` dims, the lowest frequency but one gone, the same in all heads of all layers."""
    dense = dense_model(name, head_dim=head_dim, **changes)
    shape = dataclasses.replace(dense_shape(dense.config), qk_head_dim=size, v_head_dim=size)
    tensors = [dict(layer.state_dict()) for layer in decoder_layers(sliced_model(dense, shape)[0])]
    kept = torch.tensor([*range(size // 2 - 2), head_dim // 2 - 2, head_dim // 2 - 1])
    for layer in tensors:
        layer["self_attn.rope_index"] = kept.repeat(shape.num_kv_heads, 1)
    return build_compressed(dense, [shape] * len(tensors), tensors)
