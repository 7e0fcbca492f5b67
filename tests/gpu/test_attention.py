"""Compressed models of every family give a GPU's logits as they give a CPU's: whole, padded, and token by token."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from modegpt.models import LayerShape, dense_shape, family_of
from tests.gpu.device import DEVICE, ON_GPU
from tests.models.family_table import CONFIGS, dense_model, sliced_model, smaller_shape, tokens, typical_error

pytestmark = ON_GPU
IMPLEMENTATIONS = ("sdpa", "eager")
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


def shapes(name: str) -> dict[str, LayerShape]:
    """Head sizes that fused kernels refuse, and such as they like."""
    config = CONFIGS[name]
    dense, odd = dense_shape(config), smaller_shape(config)
    aligned = dataclasses.replace(odd, v_head_dim=dense.v_head_dim, qk_head_dim=dense.qk_head_dim)
    return {"odd": odd, "aligned": aligned}


def pair(name: str, sizes: str, implementation: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model on the CPU and on the device."""
    dense = dense_model(name, attn_implementation=implementation)
    cpu, _ = sliced_model(dense, shapes(name)[sizes])
    device, _ = sliced_model(dense, shapes(name)[sizes])
    return cpu, device.to(DEVICE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", ["odd", "aligned"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_prefill_and_decoding(name: str, sizes: str, implementation: str) -> None:
    cpu, device = pair(name, sizes, implementation)
    ids = tokens()
    whole = cpu(ids).logits
    torch.testing.assert_close(device(ids.to(DEVICE)).logits.cpu(), whole, **TOLERANCE)
    cache = DynamicCache(config=device.config)
    steps = [
        device(part.to(DEVICE), past_key_values=cache).logits.cpu() for part in ids.split([7, 1, 1, 1, 1, 1], dim=1)
    ]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    _, device = pair(name, "odd", "sdpa")
    ids = tokens(batch=1, length=9).to(DEVICE)
    padded, mask = (torch.nn.functional.pad(each, (3, 0)) for each in (ids, torch.ones_like(ids)))
    both = torch.cat([padded, tokens(batch=1).to(DEVICE)])
    masks = torch.cat([mask, torch.ones_like(padded)])
    positions = (masks.cumsum(-1) - 1).clamp(min=0)
    arguments = {} if family_of(device.config).model_type == "opt" else {"position_ids": positions}
    ours = device(both, attention_mask=masks, **arguments).logits[0, 3:]
    torch.testing.assert_close(ours, device(ids).logits[0], **TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_half_precision_is_near(name: str) -> None:
    cpu, device = pair(name, "odd", "sdpa")
    ids = tokens()
    whole = cpu(ids).logits
    half = device.to(torch.bfloat16)(ids.to(DEVICE)).logits.cpu()
    assert typical_error(half, whole) < 0.03


@pytest.mark.parametrize("phase", ["eager", "compiled"])
@torch.inference_mode()
def test_a_cache_of_fixed_size(phase: str) -> None:
    """The compiler makes CUDA kernels where there is a GPU; elsewhere it stops short of machine code."""
    cpu, device = pair("llama", "odd", "sdpa")
    ids = tokens()
    cache = StaticCache(config=device.config, max_cache_len=16)
    logits = [device(ids[:, :8].to(DEVICE), past_key_values=cache).logits.cpu()]
    if phase == "compiled":
        device.compile(backend="inductor" if DEVICE == "cuda" else "aot_eager", fullgraph=True)
    logits += [device(ids[:, at : at + 1].to(DEVICE), past_key_values=cache).logits.cpu() for at in range(8, 12)]
    torch.testing.assert_close(torch.cat(logits, dim=1), cpu(ids).logits, **TOLERANCE)
