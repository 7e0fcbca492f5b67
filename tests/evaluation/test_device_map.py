"""A model that accelerate spreads over devices, memory and disk scores and is identified as the whole one."""

import json
from pathlib import Path

import pytest
import torch

from modegpt.cli.main import main
from modegpt.config import ModelConfig
from modegpt.data.embedded import TINY_MODELS
from modegpt.errors import UserError
from modegpt.models.checkpoints import load_model
from modegpt.models.integrity import fingerprint_weights
from modegpt.records.store import load_record

TINY = str(TINY_MODELS["tiny-llama"])


@pytest.mark.parametrize("memory", ["600KB", "3MB"])
def test_weights_on_disk_change_nothing(memory: str) -> None:
    whole, spread = load_model(TINY), load_model(TINY, device_map="auto", max_memory={"cpu": memory})
    assert any(tensor.is_meta for tensor in spread.state_dict().values()), "part of it is on disk"
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(spread(ids).logits, whole(ids).logits)
    assert fingerprint_weights(spread) == fingerprint_weights(whole)


def test_a_run_scores_it_as_the_whole_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MODEGPT_CACHE", str(tmp_path / "cache"))
    settings = [
        "method=dense",
        "tracking=disabled",
        "quiet=true",
        "cache.max_bytes=0",
        "evaluation.zeroshot.limit=8",
        "output.pictures=false",
    ]
    maps = {"whole": [], "spread": ["model.device_map=auto", "model.max_memory=[cpu:600KB]"]}
    records = []
    for name, own in maps.items():
        assert main([*settings, *own, f"output.root={tmp_path / name}"]) == 0
        records.append(load_record(next((tmp_path / name).glob("*/*/record.json"))))
    whole, spread = records
    assert spread["identity"] == whole["identity"]
    assert json.dumps(spread["metrics"]) == json.dumps(whole["metrics"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "everywhere"}, "model.device_map=everywhere is not known; choose from auto"),
        ({"device_map": "auto", "device": "cuda"}, "model.device=cuda has no effect"),
        ({"max_memory": ["cpu:1GB"]}, "has no effect without model.device_map"),
        ({"device_map": "auto", "max_memory": ["cpu:a lot"]}, "is not understood"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(name="m", path="m", **options)


def test_limits_are_read_by_place() -> None:
    assert ModelConfig(name="m", path="m", device_map="auto", max_memory=["0:70GiB", "cpu:1.5GB"]).memory_limits == {
        0: "70GiB",
        "cpu": "1.5GB",
    }
