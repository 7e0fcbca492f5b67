"""Weights of 8 and 4 bits in an export: the numbers that stand there, what they give back, and what has none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modegpt.cli import export as command
from modegpt.models.checkpoints import save_checkpoint
from modegpt.models.quantised import GROUP, packed, rounded
from tests.models.family_table import dense_model, sliced_model
from tests.models.saved import tiny_tokenizer


def given_back(tensors: dict[str, Tensor], name: str) -> Tensor:
    """The matrix that a reader of the format makes of what is stored."""
    scale = tensors[f"{name}_scale"].float()
    if name in tensors:
        assert tensors[name].dtype == torch.int8 and scale.shape == (len(tensors[name]), 1)
        return tensors[name].float() * scale
    words, (rows, columns) = tensors[f"{name}_packed"], tensors[f"{name}_shape"].tolist()
    assert words.dtype == torch.int32 and scale.shape == (rows, columns // GROUP)
    q = torch.stack([(words >> shift & 15) - 8 for shift in range(0, 32, 4)], dim=-1).flatten(1)
    return q.float() * scale.repeat_interleave(GROUP, dim=1)


@pytest.mark.parametrize(("bits", "noise"), [(8, 0.008), (4, 0.1)])
def test_the_nearest_scale_is_no_worse_than_that_of_the_largest_entry(bits: int, noise: float) -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    x[0] = 0.0
    q, scale = rounded(x, bits=bits, group=GROUP)
    top = 2 ** (bits - 1) - 1
    assert q.abs().max() <= top + 1 and torch.equal(q, q.round()) and torch.isfinite(scale).all()
    error = (x - q * scale.repeat_interleave(GROUP, dim=1)).square().sum()
    plain = (x.unflatten(1, (-1, GROUP)).abs().amax(-1) / top).clamp(min=1e-30).repeat_interleave(GROUP, dim=1)
    assert error <= (x - plain * (x / plain).round()).square().sum()
    assert error.sqrt() / x.norm() < noise


def test_eight_numbers_stand_in_one() -> None:
    q = torch.tensor([[-8, 7, 0, 1, 2, 3, 4, -1]])
    assert packed(q).tolist() == [[(0 | 15 << 4 | 8 << 8 | 9 << 12 | 10 << 16 | 11 << 20 | 12 << 24 | 7 << 28)]]
    assert packed(torch.full((1, 8), 7)).tolist() == [[-1]]


@pytest.mark.parametrize("engine", ["stock", "deci", "vllm"])
@pytest.mark.parametrize(("kind", "noise"), [("int8", 0.01), ("int4", 0.12)])
def test_an_export_holds_the_weights(engine: str, kind: str, noise: float, tmp_path: Path, capsys: Any) -> None:
    model = dense_model("llama", hidden_size=64, intermediate_size=64)
    model, _ = sliced_model(model)
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "ours", {})
    arguments = [str(tmp_path / "ours"), str(tmp_path / "plain"), "--engine", engine, "--force"]
    if engine != "vllm":
        arguments += ["--width-multiple", "32"]
    assert command.main(arguments) == 0
    arguments[1] = str(tmp_path / "small")
    status = command.main([*arguments, "--quantization", kind])
    if (engine, kind) == ("vllm", "int4"):  # all sizes are kept, whatever they are
        assert status == 2 and "4 bits want a multiple of 32; compress with engine=gguf" in capsys.readouterr().err
        return
    assert status == 0
    plain, small = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "small"))
    for name, tensor in plain.items():
        if "_proj.weight" in name:
            assert (given_back(small, name) - tensor).norm() < noise * tensor.norm()
        else:
            assert torch.equal(small[name], tensor)
    stored = sum(tensor.nbytes for tensor in small.values())
    assert f"{stored:,}" in capsys.readouterr().out and stored < sum(tensor.nbytes for tensor in plain.values()) * 0.8
    said = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors" and said["format"].startswith(
        {"int8": "int-", "int4": "pack-"}[kind]
    )


def test_what_has_no_such_form_is_refused(tmp_path: Path, capsys: Any) -> None:
    save_checkpoint(sliced_model(dense_model("mixtral"))[0], tiny_tokenizer(), tmp_path / "ours", {})
    assert command.main([str(tmp_path / "ours"), str(tmp_path / "x"), "--quantization", "int8", "--force"]) == 2
    assert "matrices of all experts" in capsys.readouterr().err
    assert command.main([str(tmp_path / "ours"), str(tmp_path / "x.gguf"), "--quantization", "int8"]) == 2
    assert "--quantization is for checkpoints" in capsys.readouterr().err
