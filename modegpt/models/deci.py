"""Models whose layers have an MLP width each and heads of one size: a checkpoint of the kind nemotron-nas.

vLLM, SGLang, TensorRT-LLM and MLX have a class of their own for it, DeciLM, and llama.cpp an architecture ``deci``.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from modegpt.errors import UserError
from modegpt.models import decoder_layers, family_of, layer_shapes
from modegpt.models.configuration_decilm import DeciLMConfig
from modegpt.models.export import ExportReport, Size, common_heads, dense_size, filled_layer, placed_frequencies
from modegpt.models.families import RESIZED
from modegpt.models.shapes import family_fields
from modegpt.models.weights import bias_of

FAMILIES = ("llama", "mistral", "qwen2", "phi3")
"""Those that are RMSNorm, a SiLU-gated MLP and rotary attention, and nothing else: what such engines compute."""
FFN_MULTIPLE = 256
"""What all but vLLM round widths up to, which they read from ``ffn_mult``, a multiple of the hidden size."""
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def check_deci(model: PreTrainedModel, *, engine: str = "DeciLM") -> None:
    """Raise UserError, which names the ``engine``, for a model that is no Llama of free widths in all but name."""
    config = model.config
    family = family_of(config)
    if not config.model_type.startswith(RESIZED):
        raise UserError(f"{config.model_type} has no layers of free sizes; engines know its family's own form")
    if family.model_type not in FAMILIES or config.hidden_act != "silu":
        raise UserError(f"{engine} has no layers like those of {family.model_type}; it computes {', '.join(FAMILIES)}")
    windows: set[Any] = {getattr(family.attention(layer), "window", None) for layer in decoder_layers(model)} - {None}
    if any(window < config.max_position_embeddings for window in windows):
        raise UserError(f"{engine} has no sliding window, and this model has one")


class DeciCheckpoint:
    """What ``modegpt-export --engine deci`` writes of a compressed ``model``, for vLLM and others.

    Widths are rounded up to ``width_multiple``. Where all are multiples of 256 they stand as ``ffn_mult``, which every
    engine reads; else as ``intermediate_size``, which vLLM alone does.

    Raises:
        UserError: the model is no Llama of free widths, or has rotary scaling that changes with the length.
    """

    def __init__(self, model: PreTrainedModel, *, width_multiple: int = 1):
        check_deci(model)
        kind = model.config.rope_parameters.get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise UserError(f"rotary scaling of type {kind} was not tried in DeciLM")
        self.model, self.family, (self.head_dim, pairs) = model, family_of(model.config), common_heads(model)
        self.widths, heads = deci_sizes(model, width_multiple)
        # the first norm of the engines' layers starts the sum that the others enter
        self.heads = [model.config.dense_kv_heads * (count > 0 or index == 0) for index, count in enumerate(heads)]
        self.biased = self._biased()
        self.config = self._config(model.config.rope_parameters if pairs is None else placed_frequencies(model))

    @property
    def report(self) -> ExportReport:
        """What it costs."""
        config, sizes = self.model.config, [tensor.shape.numel() for tensor in self.tensors.values()]
        cache = 2 * self.model.dtype.itemsize * self.head_dim * sum(self.heads)
        exported = Size(sum(sizes), self.model.dtype.itemsize * sum(sizes), cache)
        hint = (
            f"Zeros fill heads to {self.head_dim}, and widths to {min(self.widths)}.."
            f"{max(self.widths)} (compressed: {min(config.intermediate_sizes)}..{max(config.intermediate_sizes)}). "
            "Smaller: --engine vllm, which keeps every size, or a model compressed with engine=deci."
        )
        note = "" if self._common else "Only vLLM reads such widths; others want --width-multiple 256."
        return ExportReport(dense_size(self.model), Size.of(self.model), exported, hint, note)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        tensors = dict(outside_layers(self.model))
        for index, layer in enumerate(decoder_layers(self.model)):
            made = deci_layer(
                layer,
                self.model.config,
                head_dim=self.head_dim,
                width=self.widths[index],
                num_kv_heads=self.heads[index],
                biased=self.biased,
                where=f"layer {index}",
            )
            tensors |= {f"{self.family.layers}.{index}.{name}": tensor for name, tensor in made.items()}
        return tensors

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, as of a model."""
        return self.tensors

    def save_pretrained(self, directory: str | Path, *, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write weights, configuration and the code that reads it; ``state_dict`` instead of its own tensors."""
        self.config.save_pretrained(directory)
        if self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(directory)
        tensors = self.tensors if state_dict is None else state_dict
        huggingface_hub.save_torch_state_dict(tensors, directory, metadata={"format": "pt"})

    @property
    def _common(self) -> bool:
        return all(width % FFN_MULTIPLE == 0 for width in self.widths)

    def _biased(self) -> set[str]:
        """Maps with a bias: the engines have it for all of queries, keys and values, or of these and the output."""
        found = {
            path
            for layer in decoder_layers(self.model)
            for path in (*ATTENTION, *MLP)
            if bias_of(layer.get_submodule(path)) is not None
        }
        wanted = set(ATTENTION) if ATTENTION[3] in found else set(ATTENTION[:3]) if found & set(ATTENTION) else set()
        return wanted | (set(MLP) if found & set(MLP) else set())

    def _config(self, rope_parameters: dict[str, Any]) -> PreTrainedConfig:
        fields, biased, config = family_fields(self.model.config), self.biased, self.model.config
        known = {name: value for name, value in fields.items() if name in LlamaConfig().to_dict()}
        known |= {
            "head_dim": self.head_dim,
            "rope_parameters": rope_parameters,
            "num_key_value_heads": config.dense_kv_heads,
            "intermediate_size": max(self.widths),
            "attention_bias": ATTENTION[3] in biased,
            "mlp_bias": bool(biased & set(MLP)),
        }
        group, plain = config.num_attention_heads // config.dense_kv_heads, {"replace_with_linear": False}
        blocks = []
        for width, heads in zip(self.widths, self.heads, strict=True):
            size = {"ffn_mult": 1.5 * width / config.hidden_size} if self._common else {"intermediate_size": width}
            attention = {"no_op": heads == 0, "n_heads_in_group": group if heads else None}
            mlp = {"no_op": width == 0, **(size if width else {"ffn_mult": None} if self._common else size)}
            blocks.append({"attention": attention | plain, "ffn": mlp | plain})
        made = DeciLMConfig(**known, block_configs=blocks, architectures=["DeciLMForCausalLM"])
        made.dtype = self.model.dtype
        if set(ATTENTION[:3]) <= biased and ATTENTION[3] not in biased:
            made.qkv_bias = True  # where the output has none
        return made


def outside_layers(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors that stand in no decoder layer, without a head that is the embeddings."""
    for name, tensor in untied(model):
        if not name.startswith(f"{family_of(model.config).layers}."):
            yield name, tensor


def untied(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The state dict without a head that is the embeddings."""
    for name, tensor in model.state_dict().items():
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            yield name, tensor


def deci_sizes(model: PreTrainedModel, multiple: int) -> tuple[list[int], list[int]]:
    """Widths and key/value heads by layer.

    A layer may lack attention, and then an MLP too; one that has a constant left in their place keeps the least of it,
    and so do a layer that has heads alone, and the last one.
    """
    family, widths, kv_heads = family_of(model.config), [], []
    for index, (shape, layer) in enumerate(zip(layer_shapes(model.config), decoder_layers(model), strict=True)):
        constant = [bias_of(layer.get_submodule(path)) is not None for path in (family.output_path, family.down_path)]
        heads = max(shape.num_kv_heads, int(constant[0]))
        needed = heads > 0 or constant[1] or index == model.config.num_hidden_layers - 1
        widths.append(-(-max(shape.intermediate_size, int(needed)) // multiple) * multiple)
        kv_heads.append(heads)
    return widths, kv_heads


def deci_layer(
    layer: Any, config: PreTrainedConfig, *, head_dim: int, width: int, num_kv_heads: int, biased: set[str], where: str
) -> dict[str, Tensor]:
    """The tensors of a layer of these sizes; without the attention or MLP that it has not, and their norms.

    ``biased`` are the paths that have a bias.
    """
    tensors = filled_layer(
        family_of(config),
        layer,
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        width=width,
        biased=biased,
        where=where,
        engine="DeciLM",
    )
    gone = [*ATTENTION, "input_layernorm"] if num_kv_heads == 0 else []
    gone += [*MLP, "post_attention_layernorm"] if width == 0 else []
    left_out = tuple(f"{path}." for path in gone)
    return {name: tensor for name, tensor in tensors.items() if not (left_out and name.startswith(left_out))}
