"""Targets that people state, as the share of the weights to remove that meets them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from modegpt.config import CompressionConfig, RunConfig, read_bytes
from modegpt.errors import UserError
from modegpt.methods.base import RankMethod
from modegpt.methods.registry import make_method
from modegpt.models import block_linear_parameters, cache_bytes_per_token

STEP = 1e-3
"""Sparsities are found to so much, rounded up."""


def aimed(config: RunConfig, model: PreTrainedModel, *, say: Callable[[str], object]) -> RunConfig:
    """``config`` with the sparsity at which the dense ``model`` meets the target in bytes; itself where it has none.

    Keys and values are taken to shrink as the weights do where the method reduces heads, and not at all elsewhere.

    Raises:
        UserError: the dense model meets the target, nothing does, or no method is there to meet it.
    """
    compression, method = config.compression, make_method(config)
    if compression.target_bytes is None:
        return config
    if method is None:
        raise UserError("compression.target_bytes has no effect with method=dense; leave it out")
    wanted, dense = read_bytes("compression.target_bytes", compression.target_bytes), bytes_needed(model, compression)
    block = model.dtype.itemsize * block_linear_parameters(model)
    if isinstance(method, RankMethod) and not method.whole:
        block += dense - bytes_needed(model, replace(compression, target_context=0))
    asked = f"compression.target_bytes={compression.target_bytes}"
    if dense <= wanted:
        raise UserError(f"{asked}: the dense model takes {dense:,} bytes, which is no more; there is nothing to remove")
    sparsity = math.ceil((dense - wanted) / block / STEP) * STEP
    if sparsity >= 1:
        raise UserError(f"{asked} cannot be met: {dense - block:,} bytes are left where everything is removed")
    sparsity = round(sparsity, 3)
    say(f"{asked}: {dense:,} bytes dense, {wanted:,} wanted, so compression.sparsity={sparsity:g}")
    return replace(config, compression=replace(compression, sparsity=sparsity))


def bytes_needed(model: PreTrainedModel, compression: CompressionConfig) -> int:
    """Bytes of the weights, and of keys and values for the context and batch that the target states."""
    tokens = compression.target_context * compression.target_batch
    return model.dtype.itemsize * model.num_parameters() + tokens * cache_bytes_per_token(model.config, model.dtype)


def target_facts(compression: CompressionConfig, model: PreTrainedModel) -> dict[str, Any]:
    """What a record says of the target and of what the compressed ``model`` takes; empty where there is no target."""
    if compression.target_bytes is None:
        return {}
    wanted = read_bytes("compression.target_bytes", compression.target_bytes)
    return {"target_bytes": wanted, "achieved_bytes": bytes_needed(model, compression)}


def missed_bytes(facts: Mapping[str, Any]) -> list[str]:
    """A warning where the target is missed."""
    if not facts or facts["achieved_bytes"] <= facts["target_bytes"]:
        return []
    return [f"the target is missed: {facts['achieved_bytes']:,} bytes needed, {facts['target_bytes']:,} asked"]
