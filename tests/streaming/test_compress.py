"""Out of core and in memory give the same checkpoint, to the bit."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modegpt.allocation.policies import Entropic, Policy, Uniform
from modegpt.decompositions import (
    VARIANTS,
    MLPNystrom,
    MLPRandom,
    QueryKeyCR,
    QueryKeyRandom,
    ValueOutputRandom,
    ValueOutputSVD,
)
from modegpt.methods.base import LayerByLayer
from modegpt.methods.modegpt import MODULES, MoDeGPT
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.models import block_linear_parameters
from modegpt.models.checkpoints import load_model, load_tokenizer, save_checkpoint
from modegpt.streaming.model import StreamedModel
from modegpt.streaming.shards import Shards
from tests.models.family_table import CONFIGS, tokens
from tests.streaming.streamed_task import compress_out_of_core, save_dense, task_on

UNIFORM = Uniform()


def paper(allocation: Policy = UNIFORM, **changes: Any) -> MoDeGPT:
    return MoDeGPT(
        **{
            "mlp": MLPNystrom(),
            "query_key": QueryKeyCR(),
            "value_output": ValueOutputSVD(),
            "allocation": allocation,
            **changes,
        }
    )


def stored(directory: Path) -> dict[str, Tensor]:
    shards = Shards(directory)
    return {name: shards.read(name) for name in shards.files}


def check_same(method: LayerByLayer, dense: Path, folder: Path, **options) -> None:
    """Same tensors, reports and side files as the in-memory path saves."""
    model = load_model(str(dense), device="cpu")
    expected = method.compress(task_on(model))
    save_checkpoint(expected.model, load_tokenizer(str(dense)), folder / "in-memory", {}, max_shard_size="10KB")
    found, checkpoint, _ = compress_out_of_core(method, dense, folder / "streamed", **options)
    ours, theirs = stored(checkpoint), stored(folder / "in-memory")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert (found.layers, found.influence, found.details) == (expected.layers, expected.influence, expected.details)
    assert found.model.num_parameters() == expected.model.num_parameters()
    assert block_linear_parameters(found.model) == block_linear_parameters(expected.model)
    for path in (folder / "in-memory").iterdir():
        if path.suffix in (".json", ".py", ".txt") and "index" not in path.name and "manifest" not in path.name:
            assert (checkpoint / path.name).read_bytes() == path.read_bytes(), path.name
    ours_index, theirs_index = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (checkpoint, folder / "in-memory")
    )
    assert ours_index["metadata"] == theirs_index["metadata"]
    again = load_model(str(checkpoint), device="cpu")
    assert torch.equal(again(tokens()).logits, expected.model(tokens()).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    check_same(paper(Entropic()), save_dense(name, tmp_path / "dense"), tmp_path)


@pytest.mark.parametrize("name", ["llama3-rope-tied", "opt"])
def test_half_precision_on_disk(name: str, tmp_path: Path) -> None:
    check_same(paper(Entropic()), save_dense(name, tmp_path / "dense", torch.bfloat16), tmp_path, on_disk=True)


def combinations() -> list[tuple[str, ...]]:
    """Every decomposition of every module at least once."""
    names = [[name for name in VARIANTS[module] if (module, name) != ("query_key", "svd")] for module in MODULES]
    return [tuple(row[index % len(row)] for row in names) for index in range(max(map(len, names)))]


@pytest.mark.parametrize("variants", [*combinations(), ("nystrom", "svd", "svd")], ids="-".join)
def test_every_decomposition_is_the_same_to_the_bit(variants: tuple[str, ...], tmp_path: Path) -> None:
    chosen = {module: VARIANTS[module][name]() for module, name in zip(MODULES, variants, strict=True)}
    dense = save_dense("opt" if variants[1] == "svd" else "llama", tmp_path / "dense")  # no low-rank logits under RoPE
    check_same(paper(**chosen), dense, tmp_path)


def test_random_choices_follow_one_generator_and_skipped_layers_stay(tmp_path: Path) -> None:
    method = paper(mlp=MLPRandom(), query_key=QueryKeyRandom(), value_output=ValueOutputRandom(), skip_layers=(1,))
    check_same(method, save_dense("llama", tmp_path / "dense"), tmp_path)


def test_nothing_is_observed_where_nothing_is_needed(tmp_path: Path) -> None:
    check_same(
        paper(mlp=VARIANTS["mlp"]["svd"](), query_key=None, value_output=None),
        save_dense("llama", tmp_path / "dense"),
        tmp_path,
    )


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    "name", ["llama3-rope-tied", "opt", "qwen3", "gemma3_text", "opt-post-norm-projected", "mixtral"]
)
def test_plus_is_the_same_to_the_bit(name: str, on_disk: bool, tmp_path: Path) -> None:
    check_same(MoDeGPTPlus(), save_dense(name, tmp_path / "dense"), tmp_path, on_disk=on_disk)


@pytest.mark.parametrize(
    "changes",
    [
        {"allocation": "entropic", "temperature": False, "bias": "none", "query_key": "paper"},
        {"allocation": "uniform", "sequential": False, "refit": False, "align": False, "value_output": "values"},
        {"skip_layers": (1,)},
    ],
)
def test_plus_without_its_ingredients_is_the_same_to_the_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    check_same(MoDeGPTPlus(**changes), save_dense("llama", tmp_path / "dense"), tmp_path, on_disk=True)


@pytest.mark.parametrize("name", ["llama3-rope-tied", "opt"])
def test_plus_in_half_precision(name: str, tmp_path: Path) -> None:
    check_same(MoDeGPTPlus(), save_dense(name, tmp_path / "dense", torch.bfloat16), tmp_path, on_disk=True)


def test_plus_reads_every_layer_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the allocation, however many modules and shares it measures, and once to reduce it."""
    read: list[int] = []
    layer = StreamedModel.layer

    def noted(self: StreamedModel, index: int) -> AbstractContextManager[nn.Module]:
        read.append(index)
        return layer(self, index)

    monkeypatch.setattr(StreamedModel, "layer", noted)
    method = MoDeGPTPlus(shares=(0.1, 0.25, 0.5, 0.75))
    compress_out_of_core(method, save_dense("llama", tmp_path / "dense"), tmp_path / "streamed")
    assert read == [0, 1, 2] * 2
