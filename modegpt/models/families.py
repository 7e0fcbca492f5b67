"""The model families: where each keeps its layers and their linear maps. Data, not code."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedConfig

from modegpt.errors import UserError


@dataclass(frozen=True)
class Family:
    """One family: paths of modules (in the model for ``layers``, in a layer for the rest) and what sets it apart.

    ``gate_path`` is None where the MLP is not gated.
    """

    model_type: str
    compressed: str
    """Name of the compressed model class in ``modeling_modegpt.py``."""
    layers: str = "model.layers"
    query_path: str = "self_attn.q_proj"
    key_path: str = "self_attn.k_proj"
    value_path: str = "self_attn.v_proj"
    output_path: str = "self_attn.o_proj"
    gate_path: str | None = "mlp.gate_proj"
    up_path: str = "mlp.up_proj"
    down_path: str = "mlp.down_proj"
    attention_path: str = "self_attn"
    query_norm_path: str | None = None
    key_norm_path: str | None = None
    final_norm_path: str = "model.norm"
    final_norm_offset: float = 0.0
    """What the final norm adds to its weight."""
    rope: bool = True
    query_key_dense: str | None = None
    """Why queries and keys are left alone by default; None where they are not."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Maps that the family stores as one: path of the fused map to the paths of its parts, in row order."""

    def final_norm(self, model: nn.Module) -> nn.Module | None:
        """The norm in front of the head; None where the model has none."""
        parent, _, name = self.final_norm_path.rpartition(".")
        return getattr(model.get_submodule(parent), name, None)

    def attention(self, layer: nn.Module) -> nn.Module:
        """The attention of a layer."""
        return layer.get_submodule(self.attention_path)

    def query(self, layer: nn.Module) -> nn.Linear:
        """The query projection of a layer."""
        return linear_at(layer, self.query_path)

    def key(self, layer: nn.Module) -> nn.Linear:
        """The key projection of a layer."""
        return linear_at(layer, self.key_path)

    def value(self, layer: nn.Module) -> nn.Linear:
        """The value projection of a layer."""
        return linear_at(layer, self.value_path)

    def output(self, layer: nn.Module) -> nn.Linear:
        """The output projection of a layer's attention."""
        return linear_at(layer, self.output_path)

    def gate(self, layer: nn.Module) -> nn.Linear | None:
        """The gate projection of a layer's MLP; None where the MLP is not gated."""
        return None if self.gate_path is None else linear_at(layer, self.gate_path)

    def up(self, layer: nn.Module) -> nn.Linear:
        """The up projection of a layer's MLP."""
        return linear_at(layer, self.up_path)

    def down(self, layer: nn.Module) -> nn.Linear:
        """The down projection of a layer's MLP."""
        return linear_at(layer, self.down_path)

    def normalise_query(self, layer: nn.Module, states: Tensor) -> Tensor:
        """Query states (..., heads, d) after the head norm, where the family has one."""
        return states if self.query_norm_path is None else layer.get_submodule(self.query_norm_path)(states)

    def normalise_key(self, layer: nn.Module, states: Tensor) -> Tensor:
        """Key states (..., heads, d) after the head norm, where the family has one."""
        return states if self.key_norm_path is None else layer.get_submodule(self.key_norm_path)(states)


def linear_at(layer: nn.Module, path: str) -> nn.Linear:
    """The linear map at ``path`` in a layer.

    A compressed layer may hold two factors there (``modeling_modegpt.LowRankLinear``), which have the same sizes and
    the same call, but no weight of their own.
    """
    return cast(nn.Linear, layer.get_submodule(path))


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "MoDeGPTLlamaForCausalLM"),
        Family("mistral", "MoDeGPTMistralForCausalLM"),
        Family("qwen2", "MoDeGPTQwen2ForCausalLM"),
        Family(
            "qwen3",
            "MoDeGPTQwen3ForCausalLM",
            query_norm_path="self_attn.q_norm",
            key_norm_path="self_attn.k_norm",
            query_key_dense="the RMSNorm of queries and keys spans the whole head, "
            "so dropping columns changes those that stay",
        ),
        Family(
            "opt",
            "MoDeGPTOPTForCausalLM",
            layers="model.decoder.layers",
            final_norm_path="model.decoder.final_layer_norm",
            output_path="self_attn.out_proj",
            gate_path=None,
            up_path="fc1",
            down_path="fc2",
            rope=False,
        ),
        Family("gemma", "MoDeGPTGemmaForCausalLM", final_norm_offset=1.0),
        Family(
            "phi3",
            "MoDeGPTPhi3ForCausalLM",
            fused={
                "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
            },
        ),
    )
}

RESIZED, SLICED = "modegpt_", "sliced_"
"""How this package's own model types start: layers of free sizes, and a narrower residual stream."""


def is_ours(config: PreTrainedConfig) -> bool:
    """Whether ``config`` belongs to this package's own model classes, whatever the sizes, and not to the family's."""
    return config.model_type.startswith((RESIZED, SLICED))


def check_supported(model_type: str) -> Family:
    """The family called ``model_type``. Raises UserError naming the supported ones otherwise."""
    family = FAMILIES.get(model_type.removeprefix(RESIZED).removeprefix(SLICED))
    if family is None:
        raise UserError(f"model family {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return family


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a dense or a compressed model.

    Raises:
        UserError: the family is not supported, or this configuration of it is not.
    """
    family = check_supported(config.model_type)
    rotary_share = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    if rotary_share != 1.0:
        raise UserError(f"{config.model_type} with partial_rotary_factor {rotary_share} is not supported: it must be 1")
    if getattr(config, "use_bidirectional_attention", None):
        raise UserError(
            f"{config.model_type} with use_bidirectional_attention is not supported: only causal language models are"
        )
    return family
