"""What servers do with a compressed model: compile it, give it a cache of fixed size, batch continuously.

And what its cache weighs.
"""

import ast
import copy
import dataclasses
import inspect
import os
import textwrap
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modegpt.models import cache_bytes_per_token, decoder_layers, dense_shape
from modegpt.models.modeling_modegpt import MODELS, CompressedAttention
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


class Operations(TorchDispatchMode):
    """The names of the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def step_operations(model: PreTrainedModel) -> list[str]:
    """Those of one decoding step."""
    cache = DynamicCache(config=model.config)
    model(tokens(length=8), past_key_values=cache)
    with Operations() as operations:
        model(torch.full((2, 1), 7), past_key_values=cache)
    return operations.names


def test_a_step_of_small_heads_costs_few_operations_more() -> None:
    """A step of a small model takes as long as it has operations: 9 more a layer than the family's own have."""
    dense = dense_model("llama")
    own, ours = (len(step_operations(model)) for model in (dense, sliced_model(dense)[0]))
    assert ours - own <= 9 * dense.config.num_hidden_layers


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, 0), (torch.bfloat16, 3)])
def test_a_single_query_is_attended_without_the_fused_kernel(dtype: torch.dtype, fused: int) -> None:
    """On a CPU in float32, of equal head sizes too. Of fewer bits it is precise: it keeps the scores in float32."""
    dense = dense_model("llama").to(dtype)
    shape = dataclasses.replace(dense_shape(dense.config), qk_head_dim=6, v_head_dim=6)
    names = step_operations(sliced_model(dense, shape)[0])
    assert sum("scaled_dot_product" in name for name in names) == fused


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


def test_the_attention_is_called_where_engines_look_for_it() -> None:
    """vLLM reads the source of ``forward`` for one look-up and one call, and for a scale that it can tell from it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(CompressedAttention.forward)))
    found = [
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
    ]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in found]
    assert len(found) == len(calls) == 1
    scale = next(ast.unparse(keyword.value) for keyword in calls[0].keywords if keyword.arg == "scaling")
    for name in ("llama", "opt"):
        attention = decoder_layers(sliced_model(dense_model(name))[0])[0].self_attn
        assert scale == "self.softmax_scale" and isinstance(attention.softmax_scale, float)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_an_engine_is_given_whole_pages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for vLLM's attention: heads of a page's size, as many as the dense model has, and a flat answer."""
    model, _ = sliced_model(dense_model(name))
    expected = model(tokens()).logits
    sizes = (32, 16, 24)
    model.config.per_layer_config = {str(index): {"head_dim": size} for index, size in enumerate(sizes)}
    pages: list[tuple[int, ...]] = []

    def paged_attention(module, query, key, value, mask, **kwargs):
        assert query.shape[-1] == key.shape[-1] == value.shape[-1] and key.shape == value.shape
        pages.append((key.shape[1], key.shape[3]))
        out, _ = sdpa_attention_forward(module, query, key, value, mask, is_causal=mask is None, **kwargs)
        return out.flatten(0, 1).flatten(1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", paged_attention)
    for index, layer in enumerate(decoder_layers(model)):
        layer.self_attn.page_size = model.config.page_size(index)
    masked = model.config.get_text_config()
    windows = getattr(masked, "sliding_window", None)
    if windows:
        pytest.skip("the window is the engine's own affair, and the stand-in has none")
    masked._attn_implementation = "vllm"
    torch.testing.assert_close(model(tokens(), attention_mask=None).logits, expected, rtol=1e-4, atol=1e-4)
    assert pages == [(model.config.dense_kv_heads, size) for size in sizes]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.inference_mode()
def test_heads_are_divided_among_processes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tensor parallel does it, with half of the maps in each of two: what both put out adds up to the whole."""
    model, _ = sliced_model(dense_model(name))
    attention: Any = decoder_layers(model)[1].self_attn
    seen: dict[str, Any] = {}
    attention.register_forward_hook(
        lambda _, args, kwargs, out: seen.update(given=kwargs, out=out[0]), with_kwargs=True
    )
    model(tokens(), use_cache=False)

    def half_attention(module, query, key, value, mask, **kwargs):
        assert (
            2 * key.shape[1] == model.config.dense_kv_heads and 2 * query.shape[1] == model.config.num_attention_heads
        )
        out, _ = sdpa_attention_forward(module, query, key, value, mask, is_causal=mask is None, **kwargs)
        return out.flatten(0, 1).flatten(1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", half_attention)
    total = torch.zeros_like(seen["out"])
    model.config._attn_implementation = "vllm"
    for rank in (0, 1):
        half = copy.deepcopy(attention)
        half._forward_hooks.clear()
        half.config._attn_implementation = "vllm"
        for linear, dim in ((half.q_proj, 0), (half.k_proj, 0), (half.v_proj, 0), (half.o_proj, 1)):
            linear.tp_rank, linear.weight = rank, torch.nn.Parameter(linear.weight.chunk(2, dim=dim)[rank])
        if name == "qwen3":
            with pytest.raises(ValueError, match="norms of cut heads need all heads in one process"):
                half(**seen["given"])
            return
        total += half(**seen["given"])[0]
    torch.testing.assert_close(total, seen["out"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_each_class_has_one_without_a_head(model: type) -> None:
    config = model.config_class(num_hidden_layers=1)
    with torch.device("meta"):
        path = model(config).config.auto_map["AutoModel"]
    module, _, name = path.rpartition(".")
    without = getattr(inspect.getmodule(model), name)
    assert module == "modeling_modegpt" and without.config_class is model.config_class
    assert issubclass(without, AutoModel._model_mapping[model.__mro__[2].config_class])
