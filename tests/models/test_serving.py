"""What servers do with a compressed model: compile it, give it a cache of fixed size, batch continuously.

And what its cache weighs.
"""

import os
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

from modegpt.models import cache_bytes_per_token
from tests.models.family_table import CONFIGS, dense_model, sliced_model, tokens

NUM_NEW = 6
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14], [3, 4]]


def greedy(model: PreTrainedModel, ids: torch.Tensor, **options) -> torch.Tensor:
    mask = torch.ones_like(ids)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False, **options
    )[:, ids.shape[1] :]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_static_cache_gives_the_same_tokens(name: str) -> None:
    model, _ = sliced_model(dense_model(name))
    assert torch.equal(
        greedy(model, tokens()), greedy(model, tokens(), cache_implementation="static", disable_compile=True)
    )


PAGES = {"page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size": 8}
"""Small enough that a sequence has several; older versions of Transformers call it so."""


@pytest.mark.parametrize("name", CONFIGS)
def test_continuous_batching_gives_the_same_tokens(name: str) -> None:
    """Its pages have one size for all layers, so smaller heads are padded on their way in."""
    if name == "opt-post-norm-projected":
        pytest.skip("the family itself returns no logits of the shape that continuous batching wants")
    model, _ = sliced_model(dense_model(name))
    expected = [greedy(model, torch.tensor([prompt]), eos_token_id=None)[0].tolist() for prompt in PROMPTS]
    generation = GenerationConfig(max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32, **PAGES)
    outputs = model.generate_batch(
        PROMPTS, generation_config=generation, continuous_batching_config=batching, progress_bar=False
    )
    assert [output.generated_tokens for output in outputs.values()] == expected


@torch.inference_mode()
def decoded(model: PreTrainedModel, forward, cache) -> torch.Tensor:
    """Logits of a prompt and of two more tokens, each computed with ``forward``, (batch, 3, vocabulary)."""
    ids = tokens(length=8)
    logits = [model(ids, past_key_values=cache, logits_to_keep=1).logits]
    for token in (7, 8):
        logits.append(forward(torch.full((2, 1), token), past_key_values=cache, logits_to_keep=1).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", ["llama"])
def test_a_step_is_one_graph(name: str) -> None:
    """All that a compiler does but making machine code, without a break. (OPT's own class has one, and is not here.)"""
    check_compiled(name, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(
    "MODEGPT_TEST_COMPILER" not in os.environ,
    reason="the C++ compiler takes minutes; set MODEGPT_TEST_COMPILER=1 to have it",
)
def test_compiled_steps_give_the_same_logits() -> None:
    check_compiled("llama", backend="inductor", num_hidden_layers=1)


def check_compiled(name: str, *, backend: str, **changes) -> None:
    model, _ = sliced_model(dense_model(name, **changes))
    compiled = torch.compile(model.forward, backend=backend, fullgraph=True)
    ours = decoded(model, compiled, StaticCache(config=model.config, max_cache_len=16))
    torch.testing.assert_close(
        ours, decoded(model, model.forward, DynamicCache(config=model.config)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
@torch.inference_mode()
def test_the_cache_shrinks_as_the_formula_says(name: str) -> None:
    dense = dense_model(name)
    sizes = {}
    for label, model in (("dense", dense), ("compressed", sliced_model(dense)[0])):
        cache = DynamicCache(config=model.config)
        model(tokens(batch=2, length=12), past_key_values=cache)
        layers: list[Any] = cache.layers
        sizes[label] = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        assert sizes[label] == 2 * 12 * cache_bytes_per_token(model.config, model.dtype)
    head, qk = dense.config.head_dim if hasattr(dense.config, "head_dim") else 8, model.config.qk_head_dims[0]
    assert sizes["compressed"] / sizes["dense"] == (qk + model.config.v_head_dims[0]) / (2 * head) < 1
