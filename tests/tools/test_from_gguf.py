"""The conversion of a GGUF file: the weights and tokens of the file, and one line for a mistake."""

import json
import sys
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from modegpt.data.embedded import TINY_MODELS
from tests.scripts import load_script


def _interleaved(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of query or key weights (out, ...) with rotary pairs side by side, as GGUF files have them in Llamas."""
    return rows.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def _write(file: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Write ``model``, its matrices in blocks of 8 bits. Returns the weights that these stand for, by name."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(config.vocab_size)))
    writer.add_token_types(
        [
            gguf.TokenType.CONTROL if token in tokenizer.all_special_ids else gguf.TokenType.NORMAL
            for token in range(config.vocab_size)
        ]
    )
    writer.add_token_merges(
        [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    )
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    blocks, stood_for = gguf.GGMLQuantizationType.Q8_0, {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        tensor = names.get_name(name.removesuffix(".weight")) + ".weight"
        if weight.ndim == 1:
            writer.add_tensor(tensor, weight.numpy())
            continue
        rows = gguf.quants.quantize(weight.numpy(), blocks)
        stood_for[name] = torch.from_numpy(gguf.quants.dequantize(rows, blocks))
        if heads := {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            name.split(".")[-2]
        ):
            rows = _interleaved(torch.from_numpy(rows), heads).numpy()
        writer.add_tensor(tensor, rows, raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stood_for


def test_the_weights_and_tokens_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(TINY_MODELS["tiny-llama"]),
        AutoTokenizer.from_pretrained(TINY_MODELS["tiny-llama"]),
    )
    stood_for = _write(tmp_path / "tiny.gguf", model, tokenizer)
    assert not torch.equal(stood_for["model.layers.0.mlp.down_proj.weight"], model.model.layers[0].mlp.down_proj.weight)
    script = load_script("tools/from_gguf")
    monkeypatch.setattr(sys, "argv", ["from_gguf.py", str(tmp_path / "tiny.gguf"), str(tmp_path / "new")])
    assert script.main() == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    converted, text = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "new"),
        "One day, a little girl named Lily found a needle.",
    )
    model.load_state_dict(stood_for, strict=False)
    ids = AutoTokenizer.from_pretrained(tmp_path / "new")(text, return_tensors="pt", add_special_tokens=False).input_ids
    assert ids.tolist() == tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.tolist()
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("file", "folder", "said"),
    [
        ("none.gguf", "new", "none.gguf is not a file"),
        ("some.gguf", ".", "exists already"),
        ("some.gguf", "new", "pip install gguf"),
    ],
)
def test_a_mistake_is_one_line(
    file: str, folder: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script = load_script("tools/from_gguf")
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["from_gguf.py", str(tmp_path / file), str(tmp_path / folder)])
    assert script.main() == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
