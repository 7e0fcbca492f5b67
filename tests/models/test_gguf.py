"""Models in GGUF files: the weights and tokens of the file, compressed like any, and one line for a mistake."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)

import modegpt
from modegpt.data.embedded import TINY_MODELS
from modegpt.errors import UserError
from modegpt.models import block_linear_parameters
from modegpt.models.checkpoints import load_config, load_model, load_tokenizer


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


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """tiny-llama in a GGUF file, and the weights that its blocks stand for."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return file, _write(
        file,
        AutoModelForCausalLM.from_pretrained(TINY_MODELS["tiny-llama"]),
        AutoTokenizer.from_pretrained(TINY_MODELS["tiny-llama"]),
    )


def test_the_weights_and_tokens_are_those_of_the_file(tiny_file: tuple, tmp_path: Path) -> None:
    file, stood_for = tiny_file
    model = AutoModelForCausalLM.from_pretrained(TINY_MODELS["tiny-llama"])
    assert not torch.equal(stood_for["model.layers.0.mlp.down_proj.weight"], model.model.layers[0].mlp.down_proj.weight)
    model.load_state_dict(stood_for, strict=False)
    loaded, tokenizer = modegpt.load(file, device="cpu"), modegpt.load_tokenizer(str(file))
    text = "One day, a little girl named Lily found a needle."
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    theirs = AutoTokenizer.from_pretrained(TINY_MODELS["tiny-llama"])
    assert ids.tolist() == theirs(text, return_tensors="pt", add_special_tokens=False).input_ids.tolist()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert not hasattr(loaded.config, "quantization_config") and not getattr(loaded, "is_quantized", False)
    loaded.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    again = modegpt.load(tmp_path / "checkpoint", device="cpu")
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    assert modegpt.load(file, dtype="bfloat16", device="cpu").dtype == torch.bfloat16


def test_it_is_compressed_like_any_model(tiny_file: tuple) -> None:
    file, _ = tiny_file
    smaller = modegpt.compress(str(file), None, "tiny", sparsity=0.3, num_samples=8)
    share = block_linear_parameters(smaller) / block_linear_parameters(
        modegpt.load("embedded:tiny-llama", device="cpu")
    )
    assert share == pytest.approx(0.7, abs=0.01)


def test_the_header_is_read_once_for_model_and_tokenizer(
    tiny_file: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(shutil.copy(tiny_file[0], tmp_path))
    written = AutoConfig.from_pretrained(tmp_path, gguf_file=file.name).to_dict()
    read: list[dict[str, Any]] = []
    original = modeling_gguf_pytorch_utils.load_gguf_checkpoint

    def noted(*arguments: Any, **options: Any) -> Any:
        read.append(options)
        return original(*arguments, **options)

    monkeypatch.setattr(modeling_gguf_pytorch_utils, "load_gguf_checkpoint", noted)
    load_tokenizer(str(file)), load_model(str(file), device="cpu")
    assert [options["return_tensors"] for options in read] == [False, False, True], "ours, the tokenizer's, the weights"
    assert load_config(str(file), str(tmp_path)).to_dict() == written
    file.touch()
    load_config(str(file), str(tmp_path))
    assert len(read) == 4, "another file is read again"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.gguf", None, "no GGUF file at"),
        ("text.gguf", b"a poem", "is not a GGUF file: it does not begin with GGUF"),
        ("cut.gguf", b"GGUF", "cannot load"),
    ],
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_mistake_is_one_line(load: Callable, name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        load(str(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_the_package_that_reads_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("modegpt.models.gguf.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf"):
        load_model(str(tmp_path / "some.gguf"))
