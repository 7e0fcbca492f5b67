"""Every family, from one table: dense parity, slicing against zeroed stock weights, cache, padding and generation."""

import copy
import warnings

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from modegpt.decompositions.modules import ExpertWeights
from modegpt.models import (
    block_linear_parameters,
    build_compressed,
    decoder_layers,
    dense_shape,
    family_of,
    is_compressed,
    layer_shapes,
    layer_tensors,
    read_mlps,
    read_query_key,
    read_value_output,
)
from tests.models.family_table import (
    CONFIGS,
    dense_model,
    native_model,
    sliced_model,
    smaller_shape,
    tokens,
    typical_error,
)

pytestmark = pytest.mark.parametrize("name", CONFIGS)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **kwargs) -> Tensor:
    return model(ids, **kwargs).logits


def test_full_size_reproduces_the_stock_model(name: str) -> None:
    native, dense = native_model(name), dense_model(name)
    family, shape = family_of(dense.config), dense_shape(dense.config)
    readers = {"mlp": read_mlps, "query_key": read_query_key, "value_output": read_value_output}
    rewritten = [
        layer_tensors(family, dense.config, shape, **{module: read(family, layer) for module, read in readers.items()})
        for layer in decoder_layers(dense)
    ]
    untouched = build_compressed(dense, [shape] * len(rewritten), [{} for _ in rewritten])
    rebuilt = build_compressed(dense, [shape] * len(rewritten), rewritten)
    assert type(rebuilt) is not type(native) and isinstance(rebuilt, type(native))
    expected = logits(native, tokens())
    assert torch.equal(logits(untouched, tokens()), logits(rebuilt, tokens()))
    # products of a fused map taken apart may round differently
    torch.testing.assert_close(logits(rebuilt, tokens()), expected, rtol=0, atol=1e-5 if family.taken_apart else 0)


def test_half_precision(name: str) -> None:
    """Of full size the bits of the stock model; cut, what the same model gives in float32, to rounding."""
    native, dense = native_model(name), dense_model(name)
    shape, family = dense_shape(dense.config), family_of(dense.config)
    whole = build_compressed(dense, *zip(*[(shape, {})] * len(decoder_layers(dense)), strict=True))
    expected = logits(native.bfloat16(), tokens())
    tolerance = 0.02 * float(expected.abs().max()) if family.taken_apart else 0
    torch.testing.assert_close(logits(whole.bfloat16(), tokens()), expected, rtol=0, atol=tolerance)
    compressed, _ = sliced_model(dense_model(name))
    expected = logits(compressed, tokens())
    assert typical_error(logits(compressed.bfloat16(), tokens()), expected) < 0.03


def test_slicing_equals_the_stock_model_with_the_rest_zeroed(name: str) -> None:
    dense = dense_model(name)
    compressed, selections = sliced_model(dense)
    family, size = family_of(dense.config), dense_shape(dense.config).qk_head_dim
    zeroed = copy.deepcopy(dense)

    def keep_rows(linear: torch.nn.Linear, kept: Tensor) -> None:
        """Zero every row but ``kept`` (H_kv, k) of each head."""
        heads = linear.out_features // size
        mask = (
            torch.zeros(heads, size).scatter_(1, kept.repeat_interleave(heads // kept.shape[0], dim=0), 1.0).flatten()
        )
        for parameter in linear.parameters():
            parameter.mul_(mask.view(-1, *[1] * (parameter.ndim - 1)))

    with torch.no_grad():
        for layer, selection in zip(decoder_layers(zeroed), selections, strict=True):
            keep_rows(family.query(layer), selection.query_key)
            keep_rows(family.key(layer), selection.query_key)
            keep_rows(family.value(layer), selection.value)
            for down, S in zip(family.downs(layer), selection.mlp, strict=True):
                down.weight.mul_(torch.zeros(down.in_features).index_fill_(0, S, 1.0))
    expected = logits(zeroed, tokens())
    torch.testing.assert_close(logits(compressed, tokens()), expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    assert (expected - logits(dense, tokens())).abs().max() > 0.01 * expected.abs().max(), (
        "the selection removed nothing that matters"
    )


def test_sizes_are_what_the_shapes_say(name: str) -> None:
    dense = dense_model(name)
    compressed, _ = sliced_model(dense)
    config, shape = dense.config, smaller_shape(dense.config)
    assert (
        layer_shapes(compressed.config) == [shape] * 3
        and is_compressed(compressed.config)
        and not is_compressed(config)
    )
    gated = 2 if family_of(config).gate_path else 1
    group = config.num_attention_heads // shape.num_kv_heads
    num_mlps = len(family_of(config).downs(decoder_layers(compressed)[0]))
    inner = (
        shape.num_kv_heads * (group + 1) * (shape.qk_head_dim + shape.v_head_dim)
        + (gated + 1) * shape.intermediate_size * num_mlps
    )
    assert block_linear_parameters(compressed) == 3 * config.hidden_size * inner
    assert (
        block_linear_parameters(native_model(name))
        == block_linear_parameters(dense)
        > block_linear_parameters(compressed)
    )


def test_cache_padding_and_batches_agree(name: str) -> None:
    compressed, _ = sliced_model(dense_model(name))
    ids, pad = tokens(2, 12), 5
    whole = logits(compressed, ids)
    tolerance = {"rtol": 0, "atol": 2e-5 * whole.abs().max().item()}
    with torch.no_grad():
        first = compressed(ids[:, :7], use_cache=True)
        rest = [
            compressed(ids[:, t : t + 1], past_key_values=first.past_key_values, use_cache=True).logits
            for t in range(7, 12)
        ]
        torch.testing.assert_close(torch.cat((first.logits, *rest), dim=1), whole, **tolerance)
        padded = torch.cat((torch.zeros(2, pad, dtype=torch.int64), ids), dim=1)
        mask = (torch.arange(padded.shape[1]) >= pad).long().expand_as(padded)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        left = compressed(padded, attention_mask=mask, position_ids=positions).logits[:, pad:]
    torch.testing.assert_close(left, whole, **tolerance)
    torch.testing.assert_close(torch.cat([logits(compressed, row[None]) for row in ids]), whole, **tolerance)


def test_generation_agrees_with_and_without_cache_padding_and_batching(name: str) -> None:
    compressed, _ = sliced_model(dense_model(name))
    ids = tokens(2, 8)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = compressed.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    uncached = compressed.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings)
    assert torch.equal(cached, uncached)
    mixed = torch.stack((torch.cat((torch.zeros(3, dtype=torch.int64), ids[0, :5])), ids[1]))
    out = compressed.generate(mixed, attention_mask=(mixed != 0).long(), **settings)
    alone = compressed.generate(ids[:1, :5], attention_mask=torch.ones(1, 5, dtype=torch.int64), **settings)
    assert torch.equal(out[0, 8:], alone[0, 5:]) and torch.equal(out[1], cached[1])


def test_eager_sdpa_and_attention_weights(name: str) -> None:
    compressed, _ = sliced_model(dense_model(name))
    sdpa = logits(compressed, tokens())
    compressed.set_attn_implementation("eager")
    with torch.no_grad():
        eager = compressed(tokens(), output_attentions=True)
    torch.testing.assert_close(eager.logits, sdpa, rtol=0, atol=2e-5 * sdpa.abs().max().item())
    assert len(eager.attentions) == 3 and eager.attentions[0].shape == (2, 4, 12, 12)


def test_weights_are_read_in_the_orientation_of_the_paper(name: str) -> None:
    dense = dense_model(name)
    family, layer = family_of(dense.config), decoder_layers(dense)[1]
    x = torch.randn(5, dense.config.hidden_size)

    def times(W: Tensor, b: Tensor | None, x: Tensor = x) -> Tensor:
        return x @ W if b is None else x @ W + b

    mlps, qk, vo = read_mlps(family, layer), read_query_key(family, layer), read_value_output(family, layer)
    with torch.no_grad():
        each = mlps.experts if isinstance(mlps, ExpertWeights) else [mlps]
        for index, (mlp, down) in enumerate(zip(each, family.downs(layer), strict=True)):
            up = layer.get_submodule(family.of_experts(family.up_path, len(each))[index])
            torch.testing.assert_close(times(mlp.W_U, mlp.b_U), up(x))
            assert (mlp.W_G is None) == (family.gate_path is None)
            if family.gate_path is not None:
                gate = layer.get_submodule(family.of_experts(family.gate_path, len(each))[index])
                torch.testing.assert_close(times(mlp.W_G, mlp.b_G), gate(x))
            h = torch.randn(5, dense_shape(dense.config).intermediate_size)
            torch.testing.assert_close(times(mlp.W_D, mlp.b_D, h), down(h))
        projections = [
            (qk.W_Q, qk.b_Q, family.query(layer)),
            (qk.W_K, qk.b_K, family.key(layer)),
            (vo.W_V, vo.b_V, family.value(layer)),
        ]
        for W, b, linear in projections:
            per_head = torch.stack([times(W[h], None if b is None else b[h]) for h in range(W.shape[0])], dim=1)
            torch.testing.assert_close(per_head.flatten(1), linear(x))
        states = torch.randn(5, *vo.W_O.shape[:2])
        output = torch.einsum("thd,hde->te", states, vo.W_O)
        torch.testing.assert_close(
            output if vo.b_O is None else output + vo.b_O, family.output(layer)(states.flatten(1))
        )
    assert qk.rope is family.rotates(layer)
    assert qk.W_Q.untyped_storage().data_ptr() == family.query(layer).weight.untyped_storage().data_ptr(), (
        "reading copies nothing"
    )


def test_building_shares_what_is_untouched_and_leaves_the_dense_model_alone(name: str) -> None:
    dense = dense_model(name)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compressed, _ = sliced_model(dense)
    family, own, theirs = family_of(dense.config), compressed.state_dict(), dense.state_dict()
    linears = {name for name, module in decoder_layers(dense)[0].named_modules() if isinstance(module, torch.nn.Linear)}
    changed = linears | {family.query_norm_path, family.key_norm_path}
    untouched = {key for key in own if not any(f".{path}." in key for path in changed)} & theirs.keys()
    assert "norm" in " ".join(untouched) and all(own[key].data_ptr() == theirs[key].data_ptr() for key in untouched)
    downs = family.of_experts(family.down_path, getattr(dense.config, "num_experts", 1))
    rewritten = {key for key in own if any(key.endswith(f".{path}.weight") for path in downs)}
    assert rewritten and not any(own[key].data_ptr() == theirs[key].data_ptr() for key in rewritten)
    assert all(torch.equal(before[key], value) for key, value in theirs.items())
    assert not any(tensor.is_meta for tensor in (*compressed.parameters(), *compressed.buffers()))
    tied = dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert (compressed.get_output_embeddings().weight is compressed.get_input_embeddings().weight) == tied
