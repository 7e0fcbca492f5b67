"""Ranks that the device likes: what ``compression.rank_multiple`` is where it is not given."""

import torch
from transformers import PreTrainedConfig

from modegpt.models import dense_shape

CUDA = {"mlp": 64, "query_key": 16, "value_output": 16}
"""A GPU's matrix units work on tiles of 64 and more columns of a 16-bit product. Its fused attention kernels take
query-key and value heads of unequal size only in multiples of 8, and fall back to a form that writes out all scores
otherwise; 16 fills their tiles."""
LEAST_STEPS = 8
"""A module of small size keeps at least so many ranks to choose from."""


def preferred_multiples(device: str | torch.device, config: PreTrainedConfig) -> dict[str, int]:
    """By module, the multiple that kept ranks of a dense model of ``config`` should be of on ``device``.

    A GPU's are those of ``CUDA``, or the largest power of two that leaves ``LEAST_STEPS`` ranks. 1 elsewhere: a CPU's
    products and its attention kernel take any size (``docs/speed.md``: odd ranks reach about 90 % of the ideal in
    prefill), and 1 meets the budget exactly.
    """
    shape = dense_shape(config)
    sizes = {"mlp": shape.intermediate_size, "query_key": shape.qk_head_dim, "value_output": shape.v_head_dim}
    if torch.device(device).type != "cuda":
        return dict.fromkeys(sizes, 1)
    return {module: min(CUDA[module], _power_of_two(size // LEAST_STEPS)) for module, size in sizes.items()}


def _power_of_two(limit: int) -> int:
    """The largest one that is not above ``limit``; 1 at least."""
    return 1 << max(limit, 1).bit_length() - 1
