"""What any layer may look like: no heads, no MLP, factored maps, extra biases, dropped layers; and what is refused."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, Phi3Config, PreTrainedModel
from transformers.cache_utils import StaticCache

from modegpt.decompositions.modules import LowRank, MLPWeights, QueryKeyWeights, ValueOutputWeights
from modegpt.errors import UserError
from modegpt.models import (
    LayerShape,
    block_linear_parameters,
    build_compressed,
    build_layer,
    compressed_config,
    decoder_layers,
    dense_shape,
    family_of,
    layer_tensors,
    merged_tensors,
    read_mlp,
    read_query_key,
    read_value_output,
)
from modegpt.models.families import check_supported
from modegpt.models.modeling_modegpt import _attend_once
from tests.models.family_table import (
    dense_model,
    native_model,
    random_selection,
    sliced_layer,
    sliced_model,
    sliced_query_key,
    smaller_shape,
    tokens,
)

BOTH = pytest.mark.parametrize("name", ["llama", "opt"])


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    return model(tokens() if ids is None else ids).logits


def close(actual: Tensor, expected: Tensor, scale: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=scale * expected.abs().max().item())


def generations(model: PreTrainedModel, **settings) -> list[Tensor]:
    ids = tokens(2, 8)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **settings}
    return [
        model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=cache, **settings) for cache in (True, False)
    ]


@BOTH
@pytest.mark.parametrize("num_kv_heads", [0, 1])
def test_layers_may_lose_heads(name: str, num_kv_heads: int) -> None:
    """Fewer heads equal zeroed output rows; a first layer without any must not stop the cache's count of positions."""
    dense = dense_model(name)
    family, config, shape = family_of(dense.config), dense.config, dense_shape(dense.config)
    fewer = dataclasses.replace(shape, num_kv_heads=num_kv_heads)
    layer, group = decoder_layers(dense)[0], config.num_attention_heads // shape.num_kv_heads
    qk, vo = read_query_key(family, layer), read_value_output(family, layer)

    def first(tensor: Tensor | None, count: int) -> Tensor | None:
        return None if tensor is None else tensor[:count]

    queries = group * num_kv_heads
    tensors = layer_tensors(
        family,
        config,
        fewer,
        query_key=QueryKeyWeights(
            qk.W_Q[:queries], qk.W_K[:num_kv_heads], first(qk.b_Q, queries), first(qk.b_K, num_kv_heads), rope=qk.rope
        ),
        value_output=ValueOutputWeights(vo.W_V[:num_kv_heads], vo.W_O[:queries], first(vo.b_V, num_kv_heads), vo.b_O),
    )
    compressed = build_compressed(dense, [fewer, shape, shape], [tensors, {}, {}])
    zeroed = copy.deepcopy(dense)
    with torch.no_grad():
        family.output(decoder_layers(zeroed)[0]).weight[:, queries * shape.v_head_dim :] = 0
    close(logits(compressed), logits(zeroed))
    cached, uncached = generations(compressed)
    assert torch.equal(cached, uncached)


@BOTH
def test_an_mlp_may_vanish(name: str) -> None:
    dense = dense_model(name)
    family, shape = family_of(dense.config), dense_shape(dense.config)
    none = dataclasses.replace(shape, intermediate_size=0)
    mlp = read_mlp(family, decoder_layers(dense)[1])
    empty = {
        key: None if getattr(mlp, key) is None else getattr(mlp, key)[..., :0] for key in ("W_U", "W_G", "b_U", "b_G")
    }
    tensors = layer_tensors(family, dense.config, none, mlp=dataclasses.replace(mlp, W_D=mlp.W_D[:0], **empty))
    compressed = build_compressed(dense, [shape, none, shape], [{}, tensors, {}])
    zeroed = copy.deepcopy(dense)
    with torch.no_grad():
        family.down(decoder_layers(zeroed)[1]).weight.zero_()
    close(logits(compressed), logits(zeroed))


@BOTH
def test_maps_may_be_stored_as_two_factors(name: str) -> None:
    dense = dense_model(name)
    family, config, shape = family_of(dense.config), dense.config, dense_shape(dense.config)
    rank = 6
    up, down = family.up_path, family.down_path
    factored = dataclasses.replace(shape, linear_ranks={up: rank, down: rank})
    mlp = read_mlp(family, decoder_layers(dense)[0])

    def truncated(W: Tensor) -> LowRank:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return LowRank(U[:, :rank] * S[:rank], Vh[:rank])

    W_U, W_D = truncated(mlp.W_U), truncated(mlp.W_D)
    tensors = layer_tensors(family, config, factored, mlp=dataclasses.replace(mlp, W_U=W_U, W_D=W_D))
    compressed = build_compressed(dense, [factored, shape, shape], [tensors, {}, {}])
    multiplied = copy.deepcopy(dense)
    with torch.no_grad():
        family.up(decoder_layers(multiplied)[0]).weight.copy_((W_U.A @ W_U.B).T)
        family.down(decoder_layers(multiplied)[0]).weight.copy_((W_D.A @ W_D.B).T)
    close(logits(compressed), logits(multiplied))
    d_h, n = mlp.W_U.shape
    assert block_linear_parameters(dense) - block_linear_parameters(compressed) == 2 * (d_h * n - rank * (d_h + n))
    again = read_mlp(family, decoder_layers(compressed)[0])
    assert torch.equal(again.W_U.A, W_U.A) and torch.equal(again.W_D.B, W_D.B)


def test_maps_may_gain_a_bias() -> None:
    dense = dense_model("llama")
    family, shape = family_of(dense.config), dense_shape(dense.config)
    biased = dataclasses.replace(shape, extra_biases=(family.output_path, family.down_path))
    b_O, b_D = torch.randn(2, dense.config.hidden_size)
    layer = decoder_layers(dense)[2]
    tensors = layer_tensors(
        family,
        dense.config,
        biased,
        mlp=dataclasses.replace(read_mlp(family, layer), b_D=b_D),
        value_output=dataclasses.replace(read_value_output(family, layer), b_O=b_O),
    )
    compressed = build_compressed(dense, [shape, shape, biased], [{}, {}, tensors])
    expected = copy.deepcopy(dense)
    family.output(decoder_layers(expected)[2]).bias = torch.nn.Parameter(b_O)
    family.down(decoder_layers(expected)[2]).bias = torch.nn.Parameter(b_D)
    assert torch.equal(logits(compressed), logits(expected))
    assert block_linear_parameters(compressed) == block_linear_parameters(dense)


def test_a_bias_folded_away_becomes_zeros() -> None:
    """b_V W_O moved into b_O leaves the function as it was, because attention rows sum to one."""
    dense = dense_model("opt")
    family, shape = family_of(dense.config), dense_shape(dense.config)
    vo = read_value_output(family, decoder_layers(dense)[0])
    folded = dataclasses.replace(vo, b_V=None, b_O=vo.b_O + torch.einsum("hd,hde->e", vo.b_V, vo.W_O))
    tensors = layer_tensors(family, dense.config, shape, value_output=folded)
    assert not tensors["self_attn.v_proj.bias"].any()
    close(logits(build_compressed(dense, [shape] * 3, [tensors, {}, {}])), logits(dense))


@pytest.mark.parametrize("name", ["llama", "opt", "qwen2-windows"])
def test_layers_may_go(name: str) -> None:
    dense = dense_model(name)
    shape = dense_shape(dense.config)
    compressed = build_compressed(dense, [shape] * 2, [{}, {}], kept_layers=[0, 2])
    assert compressed.config.kept_layers == [0, 2] and compressed.config.num_hidden_layers == 2
    if name == "qwen2-windows":
        assert compressed.config.layer_types == ["full_attention", "sliding_attention"]
    skipping = copy.deepcopy(dense)
    decoder_layers(skipping)[1].forward = lambda hidden_states, **_: hidden_states
    assert torch.equal(logits(compressed), logits(skipping))
    cached, uncached = generations(compressed)
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("name", ["llama3-rope-tied", "mistral-window", "opt"])
def test_static_cache_and_beams(name: str) -> None:
    compressed, _ = sliced_model(dense_model(name))
    cached, _ = generations(compressed)
    ids = tokens(2, 8)
    static = StaticCache(config=compressed.config, max_cache_len=16)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "disable_compile": True}
    out = compressed.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=static, **settings)
    assert torch.equal(out, cached)
    keys, values = static.layers[0].keys.shape[-1], static.layers[0].values.shape[-1]
    assert (keys, values) == (
        smaller_shape(dense_model(name).config).qk_head_dim,
        smaller_shape(dense_model(name).config).v_head_dim,
    )
    beams = generations(compressed, num_beams=3)
    assert torch.equal(*beams)


def test_forward_compiles_into_one_graph() -> None:
    compressed, _ = sliced_model(dense_model("llama"))
    graph = torch.compile(compressed, backend="eager", fullgraph=True)
    with torch.no_grad():
        close(graph(tokens(), use_cache=False).logits, logits(compressed))


def test_unequal_head_sizes_stay_on_the_fused_kernel() -> None:
    """Only flash attention is allowed to run here, and it refuses E != Ev unless they were padded to one size."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    compressed, _ = sliced_model(dense_model("llama"))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = logits(compressed)
    compressed.set_attn_implementation("eager")
    close(fused, logits(compressed))


@pytest.mark.parametrize("masked", ["no", "bool", "float"])
def test_a_single_query_is_attended_by_the_definition(masked: str) -> None:
    """6 queries on 2 key/value heads of 4 (keys) and 10 (values), the first sequence with two keys hidden."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 6, 1, 4), (3, 2, 7, 4), (3, 2, 7, 10))
    )
    seen = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    seen[0, ..., :2] = False
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e30)
    mask = {"no": None, "bool": seen, "float": added}[masked]
    found = _attend_once(query, key, value, mask, 0.3)
    keys, values = (states.repeat_interleave(3, dim=1) for states in (key, value))
    weights = (0.3 * query @ keys.mT + (0 if mask is None else added)).softmax(-1)
    torch.testing.assert_close(
        found, (weights @ values).transpose(1, 2), rtol=1e-6, atol=1e-7
    )  # softmax is taken in float32


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "gemma"])
def test_one_layer_runs_alone(name: str) -> None:
    dense = dense_model(name)
    family, shape = family_of(dense.config), smaller_shape(dense.config)
    compressed, selections = sliced_model(dense)
    config = compressed_config(dense.config, [shape] * 3)
    source = decoder_layers(dense)[1]
    layer = build_layer(config, 1, merged_tensors(family, source, sliced_layer(dense, 1, shape, selections[1])))
    seen: dict[str, Any] = {}

    def keep(_, args, kwargs, out) -> None:
        seen.update(x=args[0], kwargs=kwargs, out=out)

    decoder_layers(compressed)[1].register_forward_hook(keep, with_kwargs=True)
    logits(compressed)
    with torch.no_grad():
        assert torch.equal(layer(seen["x"], **seen["kwargs"]), seen["out"])


def test_dtype_mode_attention_and_generation_settings_carry_over() -> None:
    native = native_model("llama").bfloat16().train()  # casting like this ruins the rotary frequencies
    native.set_attn_implementation("eager")
    native.generation_config.top_k = 7
    shape = dense_shape(native.config)
    compressed = build_compressed(native, [shape] * 3, [{}] * 3)
    assert compressed.training and compressed.dtype == torch.bfloat16 and compressed.generation_config.top_k == 7
    assert compressed.config._attn_implementation == "eager"
    assert (
        native.model.rotary_emb.inv_freq.dtype == torch.bfloat16
        and compressed.model.rotary_emb.inv_freq.dtype == torch.float32
    )
    assert torch.equal(compressed.model.rotary_emb.inv_freq, dense_model("llama").model.rotary_emb.inv_freq)


def test_unsupported_models_are_refused_by_name() -> None:
    with pytest.raises(
        UserError,
        match="'gpt2' is not supported; supported are gemma, gemma3_text, llama, mistral, mixtral, olmo2, olmoe, opt, "
        "phi3, qwen2, qwen3, qwen3_moe, smollm3",
    ):
        family_of(GPT2Config())
    with pytest.raises(UserError, match=r"'gemma3' is not supported.*\(the nearest is gemma3_text\)"):
        check_supported("gemma3")
    with pytest.raises(UserError, match=r"partial_rotary_factor 0.5"):
        family_of(Phi3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}))
    compressed, _ = sliced_model(dense_model("llama"))
    with pytest.raises(UserError, match="compressed already"):
        dense_shape(compressed.config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("qk_head_dims", [8, 8], "qk_head_dims has 2 entries for 3 layers"),
        ("v_head_dims", [8, 8, 9], r"v_head_dims must lie in 1\.\.8"),
        ("intermediate_sizes", [40, 41, 40], r"intermediate_sizes must lie in 0\.\.40"),
        ("qk_head_dims", [8, 7, 8], "must be even"),
        ("kv_head_counts", ["2", 2, 2], "kv_head_counts"),
    ],
)
def test_configurations_are_checked(field: str, value: list, message: str) -> None:
    config = compressed_config(dense_model("llama").config)
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        type(config)(**{**config.to_dict(), field: value})


def test_heads_that_lost_dims_need_norms_of_their_own() -> None:
    dense = dense_model("qwen3")
    family, layer, shape = family_of(dense.config), decoder_layers(dense)[0], smaller_shape(dense.config)
    selection = random_selection(True, dense_shape(dense.config), shape, torch.Generator().manual_seed(0))
    bare = dataclasses.replace(sliced_query_key(read_query_key(family, layer), selection), norm_Q=None)
    with pytest.raises(AssertionError, match="q_norm needs a norm for the dims that stay"):
        layer_tensors(family, dense.config, shape, query_key=bare)


def test_tensors_that_contradict_the_shape_are_refused() -> None:
    dense = dense_model("llama")
    family, shape = family_of(dense.config), smaller_shape(dense.config)
    layer = decoder_layers(dense)[0]
    with pytest.raises(AssertionError):
        layer_tensors(family, dense.config, shape, mlp=read_mlp(family, layer))
    with pytest.raises(AssertionError, match="has a bias"):
        mlp: MLPWeights = dataclasses.replace(read_mlp(family, layer), b_D=torch.zeros(32))
        layer_tensors(family, dense.config, dense_shape(dense.config), mlp=mlp)
    selection = random_selection(True, dense_shape(dense.config), shape, torch.Generator().manual_seed(0))
    good = sliced_layer(dense, 0, shape, selection)
    incomplete = {key: tensor for key, tensor in good.items() if "rope_index" not in key}
    with pytest.raises(RuntimeError, match="rope_index"):
        build_compressed(dense, [shape] * 3, [incomplete, good, good])
    with pytest.raises(RuntimeError, match="size mismatch"):
        build_compressed(dense, [shape, shape, LayerShape(**{**vars(shape), "intermediate_size": 27})], [good] * 3)


def test_wide_heads_count_in_full() -> None:
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=40
    )
    assert dense_shape(config) == LayerShape(qk_head_dim=16, v_head_dim=16, intermediate_size=40, num_kv_heads=2)
