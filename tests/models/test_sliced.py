"""The sliced model as a Hugging Face model: sizes, cache, padding, saving, and loading without this package."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import modegpt.models  # noqa: F401  (registers the classes)
from modegpt.methods.slicegpt import SLICED_MODELS
from modegpt.models import block_linear_parameters, is_compressed
from modegpt.models.modeling_sliced import MODELS, StreamRMSNorm
from tests.models.family_table import CONFIGS, tokens

SIZES = [20, 24, 22, 18, 26, 28, 32]
CLASSES = {model.config_class.model_type: model for model in MODELS}
FORMS = ["llama", "llama-multihead-biased", "mistral-window", "qwen2-windows", "qwen3", "opt", "mixtral", "olmoe"]


def sliced_model(form: str) -> PreTrainedModel:
    """A random sliced model whose stream has another width at every block."""
    dense = CONFIGS[form]
    model_class = CLASSES[f"sliced_{dense.model_type}"]
    fields = {
        key: value
        for key, value in dense.to_dict().items()
        if key not in ("model_type", "architectures", "transformers_version")
    }
    torch.manual_seed(0)
    model = model_class(
        model_class.config_class(**fields | {"stream_sizes": SIZES, "tie_word_embeddings": False})
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


@pytest.mark.parametrize("form", FORMS)
def test_sizes_follow_the_configuration(form: str):
    model = sliced_model(form)
    assert model(tokens(), output_hidden_states=True).hidden_states[1].shape[-1] == SIZES[2]
    layers = model.get_decoder().layers
    assert [layer.attention_shortcut.weight.shape for layer in layers] == [(SIZES[i + 1], SIZES[i]) for i in (0, 2, 4)]
    assert [layer.mlp_shortcut.weight.shape for layer in layers] == [(SIZES[i + 1], SIZES[i]) for i in (1, 3, 5)]
    linears = [
        each for name, each in model.named_parameters() if ".layers." in name and not name.endswith("gate.weight")
    ]
    matrices = sum(parameter.numel() for parameter in linears if parameter.ndim == 2)  # a router counts for nothing
    assert block_linear_parameters(model) == matrices and is_compressed(model.config)


@pytest.mark.parametrize("form", FORMS)
def test_generates_with_the_cache(form: str):
    model = sliced_model(form)
    cached, uncached = (
        model.generate(tokens(), max_new_tokens=8, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached) and cached.shape[1] == 20


@pytest.mark.parametrize("form", FORMS)
def test_left_padding_changes_nothing(form: str):
    model, ids = sliced_model(form), tokens(batch=1, length=6)
    padded = torch.cat((torch.zeros(1, 4, dtype=ids.dtype), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 4, dtype=ids.dtype), torch.ones_like(ids)), dim=1)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    from_padded = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(plain[:, 6:], from_padded[:, 10:])


@pytest.mark.parametrize("form", ["llama", "qwen3", "opt", "qwen3_moe"])
def test_saves_and_loads_by_auto_class(form: str, tmp_path):
    model = sliced_model(form)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_sliced.py").is_file()
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    loaded, report = found
    assert type(loaded) is type(model) and not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_loads_where_this_package_is_absent(tmp_path):
    for form in ("llama", "opt", "mixtral"):
        model = sliced_model(form)
        model.save_pretrained(tmp_path / form)
        with torch.no_grad():
            torch.save(model(tokens()).logits, tmp_path / f"{form}.pt")
    torch.save(tokens(), tmp_path / "tokens.pt")
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
for form in ("llama", "opt", "mixtral"):
    model = AutoModelForCausalLM.from_pretrained(form, trust_remote_code=True).eval()
    assert "modegpt" not in sys.modules and type(model.config) is type(model).config_class
    assert torch.equal(model(torch.load("tokens.pt")).logits, torch.load(f"{form}.pt")), form
    assert model.generate(torch.load("tokens.pt"), max_new_tokens=3, do_sample=False).shape[1] == 15
print("same")
"""
    environment = {"PATH": "/usr/bin", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == "same", run.stderr[-2000:]


def test_configuration_states_its_sizes(tmp_path):
    config = SLICED_MODELS["llama"].config_class(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=2, stream_sizes=[8, 8, 8, 8, 16]
    )
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (
        saved["stream_sizes"] == [8, 8, 8, 8, 16]
        and saved["hidden_size"] == 16
        and saved["model_type"] == "sliced_llama"
    )
    assert SLICED_MODELS["opt"].config_class(num_hidden_layers=1, hidden_size=16).stream_sizes == [16] * 3
    for wrong in (
        {"stream_sizes": [8] * 4},
        {"stream_sizes": [8] * 4 + [17]},
        {"stream_sizes": [0] + [8] * 4},
        {"tie_word_embeddings": True},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SLICED_MODELS["llama"].config_class(num_hidden_layers=2, hidden_size=16, **wrong)


def test_norm_takes_its_mean_over_the_dense_width():
    x = torch.randn(3, 6, dtype=torch.float64)
    wide = torch.cat((x, torch.zeros(3, 2, dtype=torch.float64)), dim=1)
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(StreamRMSNorm(8, 1e-5)(x), expected[:, :6], rtol=1e-12, atol=0)
    low = StreamRMSNorm(8, 1e-5)(x.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), expected[:, :6], rtol=0.03, atol=0.01)
