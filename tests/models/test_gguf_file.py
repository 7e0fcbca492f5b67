"""A compressed model as a GGUF file: what stands in it, what it weighs, and what has no place there."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.cli import export as command
from modegpt.errors import UserError
from modegpt.models import build_compressed, decoder_layers, dense_shape
from modegpt.models.checkpoints import load_tokenizer, save_checkpoint
from modegpt.models.gguf_file import quantise_q4_k, write_gguf
from tests.models.family_table import dense_model, sliced_model, smaller_shape, with_shared_pairs
from tests.models.saved import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("embedded:tiny-llama")


def unequal_model(name: str, **changes) -> PreTrainedModel:
    """Layers of three widths, the last one dense."""
    dense = dense_model(name, vocab_size=1536, **changes)
    full = dense_shape(dense.config)
    shapes = [smaller_shape(dense.config), dataclasses.replace(smaller_shape(dense.config), intermediate_size=17), full]
    cut = [sliced_model(dense, shape)[0] for shape in shapes]
    return build_compressed(dense, shapes, [decoder_layers(each)[index].state_dict() for index, each in enumerate(cut)])


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    return (
        {name: field.contents() for name, field in reader.fields.items()},
        {tensor.name: tensor for tensor in reader.tensors},
    )


@pytest.mark.parametrize("name", ["llama", "llama-multihead-biased", "mistral", "qwen2", "phi3"])
def test_deci_keeps_each_width(name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = unequal_model(name)
    report = write_gguf(model, tokenizer, tmp_path / "model.gguf", kind="f32")
    keys, tensors = read(tmp_path / "model.gguf")
    assert keys["general.architecture"] == "deci" and keys["deci.feed_forward_length"] == [28, 17, 40]
    assert keys["deci.attention.head_count_kv"] == [model.config.dense_kv_heads] * 3
    assert report.exported.cache_bytes == 2 * 2 * 8 * 3 * model.config.dense_kv_heads
    assert report.exported.weight_bytes == sum(tensor.n_bytes for tensor in tensors.values())
    assert report.exported.num_parameters == sum(tensor.n_elements for tensor in tensors.values())
    down = decoder_layers(model)[1].mlp.down_proj.weight.detach().numpy()
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"].data, down)
    # a query of the dense last layer: Transformers' halves of a head become neighbours
    query = decoder_layers(model)[2].self_attn.q_proj.weight.detach().numpy()
    np.testing.assert_array_equal(tensors["blk.2.attn_q.weight"].data[:8], query[[0, 4, 1, 5, 2, 6, 3, 7]])
    assert keys["tokenizer.ggml.tokens"][672] == "Ġeats" and keys["tokenizer.ggml.pre"] == "gpt-2"
    assert len(keys["tokenizer.ggml.tokens"]) == 1536 and keys["tokenizer.ggml.merges"]


def test_scaled_frequencies_are_factors(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = unequal_model("llama3-rope-tied")
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    _, tensors = read(tmp_path / "model.gguf")
    plain = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    factors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    assert factors.max() > 1 and "output.weight" not in tensors  # tied


def test_one_set_of_frequencies_is_factors_too(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = with_shared_pairs("llama", vocab_size=1536)
    report = write_gguf(model, tokenizer, tmp_path / "model.gguf", kind="f32")
    keys, tensors = read(tmp_path / "model.gguf")
    assert keys["deci.attention.key_length"] == keys["deci.attention.value_length"] == 6 and report.padding == 0
    factors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
    torch.testing.assert_close(
        10000.0 ** (-torch.arange(0, 6, 2) / 6) / factors, 10000.0 ** -torch.tensor([0, 2, 3]).div(4)
    )
    query = decoder_layers(model)[0].self_attn.q_proj.weight.detach().numpy() * (6 / 8) ** 0.5
    np.testing.assert_allclose(tensors["blk.0.attn_q.weight"].data[:6], query[[0, 3, 1, 4, 2, 5]], rtol=1e-5)
    with pytest.raises(UserError, match="no frequencies of one's own"):
        write_gguf(with_shared_pairs("gemma", vocab_size=1536), tokenizer, tmp_path / "no.gguf")


def test_other_families_are_padded_in_their_own(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = unequal_model("gemma")
    report = write_gguf(model, tokenizer, tmp_path / "model.gguf", kind="f32")
    keys, tensors = read(tmp_path / "model.gguf")
    assert keys["general.architecture"] == "gemma" and keys["gemma.feed_forward_length"] == 40
    norm = decoder_layers(model)[0].input_layernorm.weight.detach().numpy()
    np.testing.assert_allclose(tensors["blk.0.attn_norm.weight"].data, 1 + norm)
    assert report.gains_nothing


def test_rows_that_a_type_cannot_store(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Widths are rounded up to what the type wants, and a matrix whose rows still do not fit takes the next type."""
    model = unequal_model("llama", hidden_size=128)
    report = write_gguf(model, tokenizer, tmp_path / "q8.gguf", kind="q8_0")
    keys, tensors = read(tmp_path / "q8.gguf")
    assert keys["deci.feed_forward_length"] == [32, 32, 64]
    assert {tensor.tensor_type.name for name, tensor in tensors.items() if "norm" not in name} == {"Q8_0"}
    assert report.exported.weight_bytes == sum(tensor.n_bytes for tensor in tensors.values())
    assert "q8_0 (23)" in str(report) and "32..64" in str(report)
    write_gguf(model, tokenizer, tmp_path / "q4.gguf", kind="q4_k")
    keys, tensors = read(tmp_path / "q4.gguf")
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert keys["deci.feed_forward_length"] == [256] * 3
    assert kinds["blk.0.ffn_down.weight"] == "Q4_K" and kinds["blk.0.ffn_up.weight"] == kinds["output.weight"] == "Q8_0"
    write_gguf(model, tokenizer, tmp_path / "q40.gguf", kind="q4_0")
    keys, tensors = read(tmp_path / "q40.gguf")
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert keys["deci.feed_forward_length"] == [32, 32, 64] and kinds["output.weight"] == "Q8_0"
    assert {kind for name, kind in kinds.items() if name.startswith("blk.") and "norm" not in name} == {"Q4_0"}


def test_four_bits_are_what_llama_cpp_reads() -> None:
    """The package's own reader gives the rows back, within what the best of 16 levels a group leaves of noise."""
    rows = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float32)
    rows[0, :32], rows[1], rows[2] = 0.0, np.abs(rows[1]) + 3, rows[2] * 1e-4
    read_back = gguf.quants.dequantize(quantise_q4_k(rows), gguf.GGMLQuantizationType.Q4_K)
    relative = np.linalg.norm(read_back - rows, axis=1) / np.linalg.norm(rows, axis=1)
    assert read_back.shape == rows.shape and relative.max() < 0.085, relative
    even = np.tile(np.arange(16, dtype=np.float32) - 4, (1, 32))
    np.testing.assert_allclose(
        gguf.quants.dequantize(quantise_q4_k(even), gguf.GGMLQuantizationType.Q4_K), even, atol=0.05
    )


def test_layers_without_heads_or_mlp(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The architecture skips both together; a layer with heads alone keeps the least MLP, of zeros."""
    dense = dense_model("llama", vocab_size=1536)
    full = dense_shape(dense.config)
    shapes = [
        dataclasses.replace(full, num_kv_heads=0, intermediate_size=0),
        dataclasses.replace(full, intermediate_size=0),
        dataclasses.replace(full, num_kv_heads=0),
    ]
    layers = []
    for layer, shape in zip(decoder_layers(dense), shapes, strict=True):
        tensors = dict(layer.state_dict())
        gone = ("self_attn",) * (shape.num_kv_heads == 0) + ("mlp",) * (shape.intermediate_size == 0)
        for key in [key for key in tensors if key.startswith(gone or "nothing")]:
            tensors[key] = tensors[key][:, :0] if key.split(".")[1] in ("o_proj", "down_proj") else tensors[key][:0]
        layers.append(tensors)
    write_gguf(build_compressed(dense, shapes, layers), tokenizer, tmp_path / "model.gguf")
    keys, tensors = read(tmp_path / "model.gguf")
    assert keys["deci.attention.head_count"] == [0, 4, 0] and keys["deci.feed_forward_length"] == [0, 1, 40]
    assert not any(name.startswith("blk.0.") for name in tensors) and "blk.2.attn_norm.weight" not in tensors


def test_the_command_and_what_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys) -> None:
    save_checkpoint(sliced_model(dense_model("llama", vocab_size=1536))[0], tokenizer, tmp_path / "ours", {})
    arguments = [str(tmp_path / "ours"), str(tmp_path / "model.gguf"), "--type", "q8_0"]
    assert command.main(arguments) == 0
    told = capsys.readouterr().out
    assert "| exported " in told and "architecture deci" in told and f"written: {tmp_path / 'model.gguf'}" in told
    assert command.main(arguments) == 2 and "is there already" in capsys.readouterr().err
    for name, reason in (("opt", "no layers like those of opt"), ("mistral-window", "no sliding window")):
        with pytest.raises(UserError, match=f"llama.cpp's architecture deci has {reason}"):
            write_gguf(sliced_model(dense_model(name))[0], tokenizer, tmp_path / "no.gguf")
    with pytest.raises(UserError, match="tokenizer of WordLevel"):
        write_gguf(sliced_model(dense_model("llama"))[0], tiny_tokenizer(), tmp_path / "no.gguf")
    assert not (tmp_path / "no.gguf").exists()
