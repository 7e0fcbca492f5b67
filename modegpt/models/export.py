"""A compressed model in the forms that engines run: its family's own, and one of pages for engines that take all sizes.

The family's classes give all layers one MLP width and one head size, so smaller layers are filled up with zeros, which
changes no logit. Kept rotary pairs go back to the places of their frequencies, so heads get the dense size. Where all
heads of all layers share one size and one set of pairs they keep that size: the frequencies become LongRoPE's factors,
and queries are scaled for a softmax that divides by another root.
"""

import dataclasses
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modegpt.errors import UserError
from modegpt.models import Family, cache_bytes_per_token, decoder_layers, family_of, layer_shapes
from modegpt.models.build import restore_buffers
from modegpt.models.families import RESIZED, SLICED, is_ours
from modegpt.models.shapes import dense_config, family_fields
from modegpt.models.weights import bias_of


@dataclass(frozen=True)
class Size:
    """What a model weighs: parameters, bytes of its weights, and bytes of keys and values a token of context."""

    num_parameters: int
    weight_bytes: int
    cache_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Size":
        """The size of a model, which may be without data (meta tensors); a tied matrix counts once."""
        return cls(
            model.num_parameters(),
            sum(parameter.nbytes for parameter in model.parameters()),
            cache_bytes_per_token(model.config, model.dtype),
        )


@dataclass(frozen=True)
class ExportReport:
    """What an export costs: the sizes of the dense model, of the compressed one, and of what was exported."""

    dense: Size
    compressed: Size
    exported: Size
    hint: str = ""
    """What the growth comes from, and what would be smaller."""
    note: str = ""
    """What else there is to say of the export."""

    @property
    def padding(self) -> int:
        """Parameters that the exported form adds: zeros, and factors multiplied out."""
        return self.exported.num_parameters - self.compressed.num_parameters

    def with_tensors(self, tensors: Mapping[str, Tensor], *, tied: bool) -> "ExportReport":
        """The same with ``tensors`` as what is exported; a head that is the embeddings (``tied``) counts once."""
        stored = sum(tensor.nbytes for name, tensor in tensors.items() if not (tied and name == "lm_head.weight"))
        return dataclasses.replace(self, exported=dataclasses.replace(self.exported, weight_bytes=stored))

    @property
    def gains_nothing(self) -> bool:
        """Whether padding made the export no smaller than the dense model."""
        return self.padding > 0 and self.exported.num_parameters >= self.dense.num_parameters

    def __str__(self) -> str:
        """A table of the three sizes (Markdown, in columns), and what they mean."""
        rows: list[tuple[str, ...]] = [("", "parameters", "bytes of weights", "bytes of cache a token")]
        for name in ("dense", "compressed", "exported"):
            size: Size = getattr(self, name)
            rows.append((name, *(f"{each:,}" for each in (size.num_parameters, size.weight_bytes, size.cache_bytes))))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        rows.insert(1, (":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])))
        table = [
            f"| {row[0]:<{widths[0]}} | "
            + " | ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            + " |"
            for row in rows
        ]
        grown = self.padding > 0 or self.exported.cache_bytes > self.compressed.cache_bytes
        told = " ".join([self.hint if grown else "Nothing was filled up.", *filter(None, [self.note])])
        return "\n".join([*table, "", told])


def stock_model(model: PreTrainedModel, *, width_multiple: int = 1) -> tuple[PreTrainedModel, ExportReport]:
    """The family's own model with the logits of the compressed ``model``, to float rounding, and what that costs.

    ``width_multiple``: the MLP width is that of the widest layer, rounded up to a multiple of this, as some kernels
    want it.

    Raises:
        UserError: ``model`` is not compressed by this package, or holds something that the family has no place for.
    """
    if not is_ours(model.config):
        raise UserError(f"{model.config.model_type} is the family's own form already; copy the checkpoint as it is")
    if model.config.model_type.startswith(SLICED):
        raise UserError(
            "a model with a narrower residual stream (SliceGPT) has no stock form: "
            "its layers are joined by maps that no family has"
        )
    family, prefix = family_of(model.config), family_of(model.config).layers
    if family.head_norms and any(size < model.config.dense_head_dim for size in model.config.qk_head_dims):
        raise UserError(
            f"{family.model_type} has one norm for all heads of a layer, and heads that lost dims have norms of their "
            "own; a model for export needs decomposition/query_key=none"
        )
    config = _stock_config(model, family, width_multiple)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{prefix}.")}
    for index, (empty, layer) in enumerate(zip(decoder_layers(stock), decoder_layers(model), strict=True)):
        for name, tensor in _stock_layer(family, config, empty, layer, index).items():
            tensors[f"{prefix}.{index}.{name}"] = tensor
    stock.load_state_dict(tensors, strict=True, assign=True)
    stock.tie_weights()
    restore_buffers(stock, model)
    stock.generation_config = model.generation_config
    stock.config._attn_implementation = model.config._attn_implementation
    report = ExportReport(dense_size(model), Size.of(model), Size.of(stock), _hint(model.config))
    return stock.eval(), report


CPU_PAGES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Head sizes that vLLM's attention knows on a CPU."""


def paged_model(model: PreTrainedModel, *, pages: str) -> tuple[PreTrainedModel, ExportReport]:
    """The compressed ``model`` itself, with a page size for each layer's cache in its configuration, and its price.

    vLLM pages its cache in heads of one size for keys and values, as many as the dense model has. ``pages``: ``cpu``
    takes the sizes that its attention knows there, ``gpu`` multiples of 8. Weights keep their sizes.

    Raises:
        UserError: ``model`` is not of this package's class of free sizes, or heads are larger than any page.
    """
    if not model.config.model_type.startswith(RESIZED):
        raise UserError(f"{model.config.model_type} has no layers of free sizes; serve it as it is")
    own = Size.of(model)
    sizes = []
    for index, shape in enumerate(layer_shapes(model.config)):
        wanted = max(shape.qk_head_dim, shape.v_head_dim) if shape.num_kv_heads else 1
        fitting = [size for size in (CPU_PAGES if pages == "cpu" else range(8, 257, 8)) if size >= wanted]
        if not fitting:
            raise UserError(f"layer {index} has heads of {wanted}; the largest page is of 256")
        sizes.append(fitting[0])
    model.config.per_layer_config = {str(index): {"head_dim": size} for index, size in enumerate(sizes)}
    cache = 2 * model.dtype.itemsize * model.config.dense_kv_heads * sum(sizes)
    exported = dataclasses.replace(own, cache_bytes=cache)
    hint = f"Heads are filled up to pages of {', '.join(map(str, sorted(set(sizes))))}; all weights keep their sizes."
    return model, ExportReport(dense_size(model), own, exported, hint)


def dense_size(model: PreTrainedModel) -> Size:
    """The size of the dense model that a compressed ``model`` was made of, in the same dtype."""
    with torch.device("meta"):
        return Size.of(AutoModelForCausalLM.from_config(dense_config(model.config), dtype=model.dtype))


def _hint(config: PreTrainedConfig) -> str:
    widths = f"MLPs ({min(config.intermediate_sizes)} to {max(config.intermediate_sizes)} wide) to the widest"
    return (
        f"Zeros fill {widths}, and heads to the dense {config.dense_head_dim}. Smaller: --engine vllm, which keeps "
        "every size, or a model compressed with engine=stock allocation=uniform, which needs no zeros."
    )


def _stock_config(model: PreTrainedModel, family: Family, width_multiple: int) -> PreTrainedConfig:
    """The family's configuration: the widest layer's width, the most heads that a layer has, dense head sizes."""
    config = model.config
    fields = family_fields(config)
    width = -(-max(1, *config.intermediate_sizes) // width_multiple) * width_multiple
    fields[_width_field(config)] = width
    if "head_dim" in fields:  # elsewhere the head size follows from the number of heads
        num_kv_heads = max(1, *config.kv_head_counts)
        fields |= {
            "num_key_value_heads": num_kv_heads,
            "num_attention_heads": num_kv_heads * (config.num_attention_heads // config.dense_kv_heads),
        }
        fields["head_dim"], pairs = common_heads(model)
        if pairs is not None:
            fields["rope_parameters"] = placed_frequencies(model)
    attention = [family.query_path, family.key_path, family.value_path, family.output_path]
    mlp = _mlp_paths(family, getattr(config, "num_experts", 1))
    for switch, paths in (("attention_bias", attention), ("mlp_bias", mlp), ("enable_bias", attention + mlp)):
        if switch in fields:
            fields[switch] = any(
                bias_of(layer.get_submodule(path)) is not None for layer in decoder_layers(model) for path in paths
            )
    stock = AutoConfig.for_model(family.model_type, **fields)
    stock.architectures = [family.compressed.removeprefix("MoDeGPT")]
    return stock


def common_heads(model: PreTrainedModel) -> tuple[int, Tensor | None]:
    """The head size of a form that has one for all layers, and the (size / 2,) rotary pairs that stand in it.

    That is the dense size with every pair (None), but where all heads of all layers have one size and one set of pairs,
    and the family states its head size. Scaling that changes with the length, or that scales states, keeps the dense
    size.
    """
    config, family = model.config, family_of(model.config)
    attentions: list[Any] = [family.attention(layer) for layer in decoder_layers(model)]
    sizes = {size for each in attentions for size in (each.qk_dim, each.v_dim)}
    sets = {tuple(pairs) for each in attentions if each.has_rope_index for pairs in each.rope_index.tolist()}
    if len(sizes) == len(sets) == 1 and fixed_frequencies(model) and "head_dim" in family_fields(config):
        return sizes.pop(), torch.tensor(sets.pop())
    return config.dense_head_dim, None


def fixed_frequencies(model: PreTrainedModel) -> bool:
    """Whether its rotary embedding is nothing but frequencies."""
    rotary: Any = model.get_decoder().rotary_emb
    return (
        model.config.rope_parameters.get("rope_type") not in ("dynamic", "longrope") and rotary.attention_scaling == 1
    )


def frequency_factors(model: PreTrainedModel) -> Tensor:
    """What divides each default frequency of heads of the common size to give the model's own, (size / 2,) float64."""
    rotary: Any = model.get_decoder().rotary_emb
    size, pairs = common_heads(model)
    own = rotary.inv_freq.double().cpu()
    plain = model.config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return plain / (own if pairs is None else own[pairs])


def placed_frequencies(model: PreTrainedModel) -> dict[str, Any]:
    """The ``rope_parameters`` of heads of the common size: LongRoPE, with the same factors at every length."""
    factors = frequency_factors(model).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": model.config.max_position_embeddings,
    }


def _stock_layer(
    family: Family, config: PreTrainedConfig, empty: nn.Module, layer: nn.Module, index: int
) -> dict[str, Tensor]:
    """All tensors of a stock layer with the function of the compressed ``layer``.

    ``empty`` is a stock layer of the right sizes, without data.
    """
    attention = [family.query_path, family.key_path, family.value_path, family.output_path]
    paths = {*attention, *_mlp_paths(family, len(family.downs(layer)))}
    tensors = filled_layer(
        family,
        layer,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
        width=getattr(config, _width_field(config)),
        biased=paths & {name.removesuffix(".bias") for name, _ in empty.named_parameters()},
        where=f"layer {index}",
        engine=f"{config.model_type} models",
    )
    for whole, parts in family.fused.items():
        tensors[f"{whole}.weight"] = torch.cat([tensors.pop(f"{part}.weight") for part in parts])
    if family.experts_path is not None:
        count = len(family.downs(layer))
        gate, up, down = (
            torch.stack([tensors.pop(f"{path}.weight") for path in family.of_experts(role, count)])
            for role in (family.gate_path, family.up_path, family.down_path)
            if role is not None
        )
        tensors |= {
            f"{family.experts_path}.gate_up_proj": torch.cat((gate, up), dim=1),
            f"{family.experts_path}.down_proj": down,
        }
    return tensors


def filled_layer(
    family: Family,
    layer: nn.Module,
    *,
    head_dim: int,
    num_kv_heads: int,
    width: int,
    biased: Set[str],
    where: str,
    engine: str,
) -> dict[str, Tensor]:
    """The tensors of the compressed ``layer`` with zeros up to the given sizes, fused maps apart, and no rope index.

    Where ``head_dim`` is the dense one, kept rotary pairs go back to the places of their frequencies. Elsewhere it is
    the layer's own, and queries are scaled for a softmax that divides by its root. ``biased`` paths have a bias.

    Raises:
        UserError: a bias elsewhere that is not zero; ``where`` and ``engine`` say which.
    """
    attention: Any = family.attention(layer)
    own_kv_heads, group = attention.num_kv_heads, attention.num_key_value_groups
    downs = family.downs(layer)
    kept = torch.arange(attention.qk_dim).repeat(own_kv_heads, 1)
    if attention.has_rope_index and head_dim > attention.qk_dim:
        pairs = attention.rope_index.cpu()
        kept = torch.cat((pairs, pairs + head_dim // 2), dim=1)
    values = torch.arange(attention.v_dim).repeat(own_kv_heads, 1)
    # where each row (column, for the output) of a compressed map stands in the filled one, and out of how many
    places = {
        family.query_path: (_places(kept.repeat_interleave(group, 0), head_dim), group * num_kv_heads * head_dim),
        family.key_path: (_places(kept, head_dim), num_kv_heads * head_dim),
        family.value_path: (_places(values, head_dim), num_kv_heads * head_dim),
        family.output_path: (_places(values.repeat_interleave(group, 0), head_dim), group * num_kv_heads * head_dim),
        **{path: (torch.arange(downs[0].in_features), width) for path in _mlp_paths(family, len(downs))},
    }
    tensors = {
        name: tensor
        for name, tensor in layer.state_dict().items()
        if not name.endswith("rope_index") and not name.startswith(tuple(f"{path}." for path in places))
    }
    weights: dict[str, Tensor] = {}
    biases: dict[str, Tensor | None] = {}
    down_paths = family.of_experts(family.down_path, len(downs))
    for path, (positions, count) in places.items():
        linear = layer.get_submodule(path)
        inner = path == family.output_path or path in down_paths
        weights[path] = _spread(_weight(linear), positions, count, dim=1 if inner else 0)
        bias = bias_of(linear)
        biases[path] = bias if bias is None or inner else _spread(bias, positions, count, dim=0)
    if head_dim < attention.head_dim:
        scale = attention.softmax_scale * head_dim**0.5
        bias = biases[family.query_path]
        weights[family.query_path] = scale * weights[family.query_path]
        biases[family.query_path] = None if bias is None else scale * bias
    constant, value_bias, free = biases[family.output_path], biases[family.value_path], attention.v_dim
    has_place = family.value_path in biased and free < head_dim and own_kv_heads > 0
    if constant is not None and family.output_path not in biased and has_place:
        # attention rows sum to 1: a value that is always 1, in a free place of the first head, carries the constant
        assert value_bias is not None, f"{where}: {family.value_path} has a bias in the family, and none here"
        biases[family.value_path] = value_bias.index_fill(0, torch.tensor(free, device=value_bias.device), 1.0)
        weights[family.output_path][:, free] = constant
        biases[family.output_path] = None
    for path, bias in biases.items():
        if path in biased:
            bias = weights[path].new_zeros(weights[path].shape[0]) if bias is None else bias
            tensors[f"{path}.bias"] = bias
        elif bias is not None and bias.any():
            raise UserError(
                f"{where}: {path} has a bias, which {engine} cannot store; compress with a decomposition that adds none"
            )
    return tensors | {f"{path}.weight": weight for path, weight in weights.items()}


def _width_field(config: PreTrainedConfig) -> str:
    """What a family's configuration calls the width of its MLPs."""
    return next(name for name in ("ffn_dim", "moe_intermediate_size", "intermediate_size") if hasattr(config, name))


def _mlp_paths(family: Family, num_mlps: int) -> list[str]:
    """Those of the one MLP, or of all experts."""
    roles = (family.gate_path, family.up_path, family.down_path)
    return [path for role in roles if role is not None for path in family.of_experts(role, num_mlps)]


def _places(within: Tensor, size: int) -> Tensor:
    """(heads, r) places within heads of ``size`` to (heads r,) places among all rows."""
    return (within + size * torch.arange(len(within)).unsqueeze(1)).flatten()


def _spread(tensor: Tensor, positions: Tensor, count: int, *, dim: int) -> Tensor:
    """``tensor`` with its entries along ``dim`` at ``positions`` of ``count`` and zeros elsewhere.

    The same tensor where nothing moves.
    """
    if tensor.shape[dim] == count and torch.equal(positions, torch.arange(count)):
        return tensor
    shape = list(tensor.shape)
    shape[dim] = count
    return tensor.new_zeros(shape).index_copy_(dim, positions.to(tensor.device), tensor)


def _weight(linear: Any) -> Tensor:
    """The (out, in) weight of a map; two factors are multiplied out in float32 at least."""
    if hasattr(linear, "weight"):
        return linear.weight.detach()
    A, B = linear.A.weight.detach(), linear.B.weight.detach()
    wide = torch.promote_types(A.dtype, torch.float32)
    return (B.to(wide) @ A.to(wide)).to(A.dtype)
