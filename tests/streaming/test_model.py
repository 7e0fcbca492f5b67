"""A streamed model is the loaded one: same fingerprint, same layers, same perplexity, and nothing left behind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modegpt.errors import UserError
from modegpt.evaluation.perplexity import perplexity
from modegpt.models import decoder_layers
from modegpt.models.checkpoints import load_model
from modegpt.models.integrity import fingerprint_weights
from modegpt.progress import Progress
from modegpt.streaming.hidden import DiskStorage
from modegpt.streaming.model import StreamedModel
from modegpt.streaming.score import streamed_perplexity
from tests.models.family_table import tokens
from tests.streaming.streamed_task import save_dense

FAMILIES = ["llama3-rope-tied", "qwen2-windows", "opt-post-norm-projected", "gemma", "phi3", "mixtral", "olmoe"]


@pytest.mark.parametrize("name, dtype", [*((name, "auto") for name in FAMILIES), ("gemma", "float32")])
def test_fingerprint_and_sizes_are_those_of_the_loaded_model(name: str, dtype: str, tmp_path: Path) -> None:
    dense = save_dense(name, tmp_path / "dense", torch.bfloat16)
    streamed, model = StreamedModel.open(str(dense), dtype=dtype), load_model(str(dense), dtype=dtype, device="cpu")
    assert streamed.model.dtype == model.dtype and type(streamed.model) is type(model)
    assert streamed.fingerprint() == fingerprint_weights(model)
    for _ in range(2):
        assert streamed.model.num_parameters() == model.num_parameters()
        with streamed.outer(head=True):
            pass


@pytest.mark.parametrize("name", FAMILIES)
def test_perplexity_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    dense = save_dense(name, tmp_path / "dense")
    streamed, model = StreamedModel.open(str(dense)), load_model(str(dense), device="cpu")
    options = {"window": 20, "batch_tokens": 60, "progress": Progress(quiet=True)}
    text = tokens(1, 150).flatten()
    assert streamed_perplexity(streamed, streamed.model, text, **options) == perplexity(model, text, **options)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


def test_only_what_is_open_is_loaded(tmp_path: Path) -> None:
    streamed = StreamedModel.open(str(save_dense("llama", tmp_path / "dense")))
    layers = decoder_layers(streamed.model)
    with streamed.layer(1) as layer:
        assert layer is layers[1] and not any(parameter.is_meta for parameter in layer.parameters())
        assert all(parameter.is_meta for index in (0, 2) for parameter in layers[index].parameters())
    with streamed.outer(head=False) as model:
        assert model.lm_head.weight.is_meta and not model.model.embed_tokens.weight.is_meta
        assert all(parameter.is_meta for parameter in layers.parameters())
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


def test_batches_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    streamed = StreamedModel.open(str(save_dense("llama", tmp_path / "dense")))
    memory, disk = (
        DiskStorage(streamed.model, streamed, directory=place).embed(tokens(8), batch_size=3)
        for place in (None, tmp_path / "hidden")
    )
    assert len(disk.batches) == 3 and all(map(torch.equal, memory.batches, disk.batches))
    assert disk.arguments[0].keys() == {3, 2}
    [folder] = (tmp_path / "hidden").iterdir()
    assert len(list(folder.iterdir())) == 3
    del disk
    assert not folder.exists(), "they go with the list"


def test_names_of_older_checkpoints_are_understood(tmp_path: Path) -> None:
    """Without the base model's prefix, and with a tensor that nothing needs."""
    dense = save_dense("opt", tmp_path / "dense", max_shard_size="1GB")
    expected = StreamedModel.open(str(dense)).fingerprint()
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(dense / "model.safetensors").items()}
    save_file(tensors | {"decoder.unused": torch.zeros(2)}, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"tensors outside its layers that nothing reads, first decoder.unused"):
        assert StreamedModel.open(str(dense)).fingerprint() == expected
    with pytest.warns(UserWarning, match=r"tensors outside its layers that nothing reads, first decoder.unused"):
        assert expected == fingerprint_weights(load_model(str(dense), device="cpu"))


def test_refusals_name_the_cause(tmp_path: Path) -> None:
    dense = save_dense("llama3-rope-tied", tmp_path / "dense", max_shard_size="1GB")
    tensors = load_file(dense / "model.safetensors")

    def with_tensors(name: str, changed: dict) -> str:
        place = tmp_path / name
        shutil.copytree(dense, place)
        save_file(changed, place / "model.safetensors", metadata={"format": "pt"})
        return str(place)

    with pytest.raises(UserError, match="download it first"):
        StreamedModel.open("someone/model")
    with pytest.raises(UserError, match=r"lacks 1 of its tensors, first model\.norm\.weight"):
        StreamedModel.open(
            with_tensors("missing", {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"})
        )
    with pytest.raises(UserError, match=r"tie_word_embeddings=true, but lm_head\.weight is stored with other values"):
        StreamedModel.open(
            with_tensors("untied", tensors | {"lm_head.weight": torch.zeros_like(tensors["model.embed_tokens.weight"])})
        )
    with pytest.raises(UserError, match=r"hidden_size=32, but model\.norm\.weight is 3 and not 32"):
        StreamedModel.open(with_tensors("misshapen", tensors | {"model.norm.weight": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"weight model\.norm\.weight holds NaN"):
        StreamedModel.open(
            with_tensors("broken", tensors | {"model.norm.weight": tensors["model.norm.weight"] * torch.nan})
        ).fingerprint()
    (dense / "model.safetensors").rename(dense / "model.bin")
    with pytest.raises(UserError, match="no safetensors weights"):
        StreamedModel.open(str(dense))
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(UserError, match="not supported"):
        StreamedModel.open(str(dense))
