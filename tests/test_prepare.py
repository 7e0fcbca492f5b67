"""What decides the statistics of a calibration decides where they are kept, and nothing else does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modegpt.config import CacheConfig, CalibrationConfig, CompressionConfig, ModelConfig, OutOfCoreConfig, RunConfig
from modegpt.data.tokens import CalibrationTokens
from modegpt.prepare import statistics_cache
from tests.models.family_table import dense_model

TOKENS = CalibrationTokens(ids=torch.zeros(1, 2, dtype=torch.long), sha256="a" * 64, stream_tokens=2)


def config(root: Path, **changes: object) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name="m", path="m"),
        method={"name": "modegpt"},
        **{"cache": CacheConfig(dir=str(root), max_bytes=1000), **changes},
    )


def key(root: Path, *, weights: str = "w", tokens: CalibrationTokens = TOKENS, dtype=torch.float32, **changes) -> str:
    cache = statistics_cache(config(root, **changes), weights, tokens, dense_model("llama").to(dtype))
    assert cache is not None and cache.root == root and cache.max_bytes == 1000
    return cache.key


def test_the_statistics_cache_is_of_one_model_text_and_arithmetic(tmp_path: Path) -> None:
    keys = [
        key(tmp_path),
        key(tmp_path, weights="others"),
        key(tmp_path, tokens=replace(TOKENS, sha256="b" * 64)),
        key(tmp_path, dtype=torch.bfloat16),
        key(tmp_path, calibration=CalibrationConfig(precision="float32")),
        key(tmp_path, calibration=CalibrationConfig(batch_size=4)),
    ]
    assert len(set(keys)) == len(keys)


def test_the_device_is_part_of_it(tmp_path: Path) -> None:
    models = (dense_model("llama").to(device) for device in ("cpu", "meta"))
    here, elsewhere = (statistics_cache(config(tmp_path), "w", TOKENS, model) for model in models)
    assert here is not None and elsewhere is not None and here.key != elsewhere.key


def test_a_sweep_over_methods_and_rates_shares_it(tmp_path: Path) -> None:
    others = {
        "compression": CompressionConfig(sparsity=0.7, skip_layers=[1]),
        "allocation": {"name": "uniform"},
        "seed": 5,
        "calibration": CalibrationConfig(seed=9, num_samples=3),  # which the tokens stand for
    }
    assert key(tmp_path, **others) == key(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"out_of_core": OutOfCoreConfig(enabled=True)}, {"cache": CacheConfig(max_bytes=0)}]
)
def test_where_there_is_no_cache(tmp_path: Path, changes: dict) -> None:
    assert statistics_cache(config(tmp_path, **changes), "w", TOKENS, dense_model("llama")) is None
