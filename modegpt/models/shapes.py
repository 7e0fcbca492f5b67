"""The sizes of layers, dense and compressed, and the configuration that states them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from modegpt.errors import UserError
from modegpt.models import modeling_modegpt
from modegpt.models.families import RESIZED, SLICED, family_of, is_ours
from modegpt.models.modeling_modegpt import CompressedFields


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer.

    Args:
        qk_head_dim: columns a head of query and key has (even under RoPE).
        v_head_dim: columns a head of values has.
        intermediate_size: MLP width; 0 leaves only the MLP's bias.
        num_kv_heads: key/value heads, each with the dense model's number of query heads; 0 leaves only the output's
            bias.
        linear_ranks: inner size of each linear stored as two factors, by its path in the layer.
        extra_biases: paths of linears that have a bias though the family gives them none.
    """

    qk_head_dim: int
    v_head_dim: int
    intermediate_size: int
    num_kv_heads: int
    linear_ranks: dict[str, int] = field(default_factory=dict)
    extra_biases: tuple[str, ...] = ()


def compressed_class(config: PreTrainedConfig) -> type[Any]:
    """The compressed model class (a ``CompressedCausalLM``) for a dense or compressed configuration."""
    return getattr(modeling_modegpt, family_of(config).compressed)


def empty_dense_layer(config: PreTrainedConfig) -> nn.Module:
    """A decoder layer of the dense model without data (meta tensors): names, shapes and biases to look at."""
    with torch.device("meta"):
        return compressed_class(config).layer_class(config, 0)


def layer_shapes(config: PreTrainedConfig) -> list[LayerShape]:
    """The shape of each layer, in order. In a sliced model the sizes inside a layer are its family's."""
    if not config.model_type.startswith(RESIZED):
        config = compressed_config(config)
    return [
        LayerShape(
            qk_head_dim=config.qk_head_dims[index],
            v_head_dim=config.v_head_dims[index],
            intermediate_size=config.intermediate_sizes[index],
            num_kv_heads=config.kv_head_counts[index],
            linear_ranks=config.linear_ranks[index],
            extra_biases=tuple(config.extra_biases[index]),
        )
        for index in range(config.num_hidden_layers)
    ]


def is_compressed(config: PreTrainedConfig) -> bool:
    """Whether any layer, or the residual stream, is smaller than the family's own, or gone."""
    if config.model_type.startswith(SLICED):
        return True
    if not is_ours(config):
        return False
    dense = LayerShape(config.dense_head_dim, config.dense_head_dim, config.dense_width, config.dense_kv_heads)
    return config.kept_layers != list(range(config.num_hidden_layers)) or any(
        shape != dense for shape in layer_shapes(config)
    )


def dense_shape(config: PreTrainedConfig) -> LayerShape:
    """The shape every layer of a dense model has.

    Raises:
        UserError: the family is not supported, or the model is compressed already.
    """
    if is_compressed(config):
        raise UserError("this model is compressed already; start from the dense model it was made of")
    return layer_shapes(config)[0]


def cache_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one more token of context needs.

    These are ``sum over layers of H_kv (r_qk + r_v)`` elements.
    """
    return dtype.itemsize * sum(
        shape.num_kv_heads * (shape.qk_head_dim + shape.v_head_dim) for shape in layer_shapes(config)
    )


def dense_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The family's own configuration of the model that a compressed ``config`` was made of.

    Of a layer that is gone, the kind (full or sliding attention) is not known; the last one's stands for it.
    """
    fields = family_fields(config) | {"num_hidden_layers": config.num_dense_layers}
    if fields.get("layer_types"):
        kinds = fields["layer_types"]
        fields["layer_types"] = kinds + kinds[-1:] * (config.num_dense_layers - len(kinds))
    return AutoConfig.for_model(family_of(config).model_type, **fields)


def family_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What ``config`` says of its family's own settings: all but the sizes of compressed layers and the class."""
    own = {each.name for each in dataclasses.fields(CompressedFields)}
    left_out = own | {"model_type", "architectures", "auto_map", "transformers_version"}
    left_out |= {"per_layer_config", "allow_global_per_layer_attribute_access"}
    return {name: value for name, value in config.to_dict().items() if name not in left_out}


def compressed_config(
    config: PreTrainedConfig,
    shapes: Sequence[LayerShape] | None = None,
    kept_layers: Sequence[int] | None = None,
) -> PreTrainedConfig:
    """The configuration of a dense ``config`` compressed to ``shapes``, one per kept layer (None: dense sizes).

    ``kept_layers`` are the dense indices of the layers that stay, increasing; None keeps all.
    """
    model_class = compressed_class(config)
    kept = list(range(config.num_hidden_layers)) if kept_layers is None else list(kept_layers)
    assert kept == sorted(set(kept)) and all(0 <= index < config.num_hidden_layers for index in kept), kept
    fields = family_fields(config) | {
        "num_hidden_layers": len(kept),
        "kept_layers": kept,
        "num_dense_layers": config.num_hidden_layers,
    }
    if fields.get("layer_types"):
        fields["layer_types"] = [fields["layer_types"][index] for index in kept]
    if shapes is not None:
        assert len(shapes) == len(kept), (len(shapes), len(kept))
        fields |= {
            "qk_head_dims": [shape.qk_head_dim for shape in shapes],
            "v_head_dims": [shape.v_head_dim for shape in shapes],
            "kv_head_counts": [shape.num_kv_heads for shape in shapes],
            "intermediate_sizes": [shape.intermediate_size for shape in shapes],
            "linear_ranks": [dict(shape.linear_ranks) for shape in shapes],
            "extra_biases": [list(shape.extra_biases) for shape in shapes],
        }
    compressed = model_class.config_class(**fields, architectures=[model_class.__name__])
    compressed._attn_implementation = config._attn_implementation
    return compressed
