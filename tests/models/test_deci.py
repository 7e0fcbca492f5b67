"""A DeciLM checkpoint of a compressed model: sizes of each layer, the same function, read without this package."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, PreTrainedModel

from modegpt.cli import export as command
from modegpt.errors import UserError
from modegpt.models import LayerShape, build_compressed, compressed_config, deci, decoder_layers, dense_shape
from modegpt.models.checkpoints import save_checkpoint
from modegpt.models.deci import DeciCheckpoint, deci_layer
from modegpt.models.shapes import compressed_class
from tests.models.family_table import dense_model, sliced_model, smaller_shape, tokens
from tests.models.saved import tiny_tokenizer


def unequal_model(name: str) -> PreTrainedModel:
    """Layers of three widths, the last one dense."""
    dense = dense_model(name)
    full = dense_shape(dense.config)
    shapes = [smaller_shape(dense.config), dataclasses.replace(smaller_shape(dense.config), intermediate_size=17), full]
    cut = [sliced_model(dense, shape)[0] for shape in shapes]
    return build_compressed(dense, shapes, [decoder_layers(each)[index].state_dict() for index, each in enumerate(cut)])


def without_attention_or_mlp() -> PreTrainedModel:
    """A layer with nothing left, one with heads alone, one with an MLP alone and a constant in place of its heads."""
    dense = dense_model("llama")
    full = dense_shape(dense.config)
    shapes = [
        dataclasses.replace(full, num_kv_heads=0, intermediate_size=0),
        dataclasses.replace(full, intermediate_size=0),
        dataclasses.replace(full, num_kv_heads=0, extra_biases=("self_attn.o_proj",)),
    ]
    layers = []
    for layer, shape in zip(decoder_layers(dense), shapes, strict=True):
        tensors = dict(layer.state_dict())
        gone = ("self_attn",) * (shape.num_kv_heads == 0) + ("mlp",) * (shape.intermediate_size == 0)
        for key in [key for key in tensors if key.startswith(gone)]:
            tensors[key] = tensors[key][:, :0] if key.split(".")[1] in ("o_proj", "down_proj") else tensors[key][:0]
        layers.append(tensors)
    layers[2]["self_attn.o_proj.bias"] = torch.randn(dense.config.hidden_size)
    return build_compressed(dense, shapes, layers)


def as_engines_read(folder: Path) -> PreTrainedModel:
    """Layers of the sizes that ``config.json`` states, filled with the tensors of the file, each exactly once."""
    said = json.loads((folder / "config.json").read_text())
    assert said["model_type"] == "nemotron-nas" and said["architectures"] == ["DeciLMForCausalLM"]
    blocks = said["block_configs"]
    known = LlamaConfig().to_dict().keys() - {"model_type"}
    config = LlamaConfig(**{key: value for key, value in said.items() if key in known})
    if said.get("qkv_bias"):
        config.attention_bias = True
    for block in blocks:
        if not block["attention"]["no_op"]:
            heads = config.num_attention_heads // block["attention"]["n_heads_in_group"]
            assert heads == config.num_key_value_heads  # of all layers, as the engines want it
    widths = [0 if block["ffn"]["no_op"] else block["ffn"]["intermediate_size"] for block in blocks]
    counts = [0 if block["attention"]["no_op"] else config.num_key_value_heads for block in blocks]
    shapes = [
        LayerShape(config.head_dim, config.head_dim, width, count) for width, count in zip(widths, counts, strict=True)
    ]
    model = compressed_class(config)(compressed_config(config, shapes)).eval()
    tensors = load_file(folder / "model.safetensors")
    found = model.load_state_dict(tensors, strict=False)
    absent = [key for key in found.missing_keys if key != "lm_head.weight" or not config.tie_word_embeddings]
    assert not found.unexpected_keys
    for key in absent:  # of what a layer has not, and an output's bias where queries, keys and values alone have one
        tensor = model.get_parameter(key)
        assert tensor.numel() == 0 or "norm" in key or key.endswith(".bias"), key
        if key.endswith(".bias"):
            torch.nn.init.zeros_(tensor)
    model.tie_weights()
    return model


@pytest.mark.parametrize("name", ["llama", "llama-multihead-biased", "llama3-rope-tied", "mistral", "qwen2", "phi3"])
@torch.inference_mode()
def test_the_function_is_that_of_the_compressed_model(name: str, tmp_path: Path) -> None:
    model = unequal_model(name)
    written = DeciCheckpoint(model)
    written.save_pretrained(tmp_path)
    read = as_engines_read(tmp_path)
    assert read.config.intermediate_sizes == [28, 17, 40]
    torch.testing.assert_close(read(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-4)
    stored = load_file(tmp_path / "model.safetensors")
    report = written.report
    assert report.exported.num_parameters == sum(tensor.numel() for tensor in stored.values())
    assert report.exported.weight_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert report.exported.cache_bytes == 4 * 2 * 8 * 3 * model.config.dense_kv_heads
    assert report.compressed.num_parameters < report.exported.num_parameters and "Only vLLM" in str(report)


@torch.inference_mode()
def test_layers_without_attention_or_mlp(tmp_path: Path) -> None:
    """The first layer has attention, if of zeros: the engines' first norm starts the residual stream."""
    model = without_attention_or_mlp()
    DeciCheckpoint(model).save_pretrained(tmp_path)
    blocks = json.loads((tmp_path / "config.json").read_text())["block_configs"]
    assert [block["attention"]["no_op"] for block in blocks] == [False, False, False]
    torch.testing.assert_close(as_engines_read(tmp_path)(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_widths_that_every_engine_reads(tmp_path: Path) -> None:
    """They are multiples of the hidden size, which engines turn back by this rule."""
    written = DeciCheckpoint(unequal_model("llama"), width_multiple=256)
    blocks = written.config.block_configs
    hidden = written.config.hidden_size
    for block in blocks:
        width = int(2 * block["ffn"]["ffn_mult"] * hidden / 3)
        assert -(-width // 256) * 256 == 256 and "intermediate_size" not in block["ffn"]
    assert "Only vLLM" not in str(written.report)
    model = dense_model("llama", intermediate_size=1024)
    shape = dataclasses.replace(dense_shape(model.config), intermediate_size=768)
    report = DeciCheckpoint(sliced_model(model, shape)[0]).report
    assert report.padding == 0 and "Nothing was filled up" in str(report)


def test_the_command_and_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration reads with Transformers alone, its blocks by attribute."""
    model = sliced_model(dense_model("llama"), smaller_shape(dense_model("llama").config))[0]
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "ours", {})
    made = []

    def noted(*given: Any, **sizes: Any) -> dict[str, torch.Tensor]:
        made.append(sizes["where"])
        return deci_layer(*given, **sizes)

    monkeypatch.setattr(deci, "deci_layer", noted)
    assert command.main([str(tmp_path / "ours"), str(tmp_path / "deci"), "--engine", "deci"]) == 0
    assert made == ["layer 0", "layer 1", "layer 2"], "each layer is made once"
    assert "DeciLM" in (tmp_path / "deci" / "README.md").read_text() and "| exported " in capsys.readouterr().out
    code = (
        "import sys, transformers\n"
        "config = transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "block = config.block_configs[0]\n"
        "known = hasattr(block.ffn, 'ffn_mult')\n"
        "print(type(config).__name__, block.ffn.intermediate_size, known, block.attention.no_op)"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": "", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "deci"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["DeciLMConfig", "28", "False", "False"], done.stderr[-1000:]
    for name, reason in (("opt", "no layers like those of opt"), ("mistral-window", "no sliding window")):
        with pytest.raises(UserError, match=f"DeciLM has {reason}"):
            DeciCheckpoint(sliced_model(dense_model(name))[0])
    with pytest.raises(UserError, match="no layers of free sizes"):
        DeciCheckpoint(dense_model("llama"))
