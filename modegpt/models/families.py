"""Which configurations are supported, and the family of each. The families themselves are ``FAMILIES``."""

from difflib import get_close_matches

from transformers import PreTrainedConfig

from modegpt.errors import UserError
from modegpt.models.modeling_modegpt import FAMILIES, Family, linear_at

__all__ = ["FAMILIES", "RESIZED", "SLICED", "Family", "check_supported", "family_of", "is_ours", "linear_at"]

RESIZED, SLICED = "modegpt_", "sliced_"
"""How this package's own model types start: layers of free sizes, and a narrower residual stream."""


def is_ours(config: PreTrainedConfig) -> bool:
    """Whether ``config`` belongs to this package's own model classes, whatever the sizes, and not to the family's."""
    return config.model_type.startswith((RESIZED, SLICED))


def family_name(config: PreTrainedConfig) -> str:
    """Transformers' name of the family of a model, compressed or not, supported or not."""
    return _family_name(config.model_type)


def _family_name(model_type: str) -> str:
    return model_type.removeprefix(RESIZED).removeprefix(SLICED)


def check_supported(model_type: str) -> Family:
    """The family called ``model_type``. Raises UserError naming the supported ones, and the nearest, otherwise."""
    family = FAMILIES.get(_family_name(model_type))
    if family is None:
        longer = [name for name in FAMILIES if name.startswith(model_type)]
        close = longer or get_close_matches(model_type, FAMILIES, n=1)
        nearest = f" (the nearest is {close[0]})" if close else ""
        raise UserError(
            f"model family {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}{nearest}"
        )
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
    if family.experts_path is not None:
        _check_experts(config)
    if getattr(config, "use_bidirectional_attention", None):
        raise UserError(
            f"{config.model_type} with use_bidirectional_attention is not supported: only causal language models are"
        )
    return family


def _check_experts(config: PreTrainedConfig) -> None:
    """Raise UserError for a mixture of experts of which some layers have none, or that clips its states."""
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise UserError(f"{config.model_type} with layers that have no experts is not supported: all must have them")
    if getattr(config, "clip_qkv", None) is not None:
        raise UserError(f"{config.model_type} with clip_qkv={config.clip_qkv} is not supported: it must be null")
