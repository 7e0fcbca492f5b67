"""Before any work a run says what it will not be able to keep."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import modegpt.space
from modegpt.calibration.statistics import STATISTICS, sizes_of
from modegpt.config import CacheConfig, OutputConfig
from modegpt.prepare import Run, prepare
from modegpt.run import run
from modegpt.space import space_warnings
from tests.models.family_table import dense_model
from tests.small_run import small


def prepared(results: Path, **changes: Any) -> Run:
    return prepare(small(results, **changes), command="modegpt")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    free = {"bytes": 10**15}
    monkeypatch.setattr(modegpt.space, "free_bytes", lambda path: free["bytes"])
    return free


def bytes_of_layer(made: Run) -> int:
    assert made.method is not None and made.task is not None
    sizes = sizes_of(made.backend.model.config)
    elements = [STATISTICS[name].num_elements(sizes) for name in made.method.required_statistics(made.task.family)]
    return 8 * sum(elements)


def stored_bytes(results: Path) -> int:
    return sum(path.stat().st_size for path in results.parent.glob("cache/objects/*/layer*"))


def test_the_prediction_is_what_a_run_stores(results: Path, disk: dict[str, int]) -> None:
    """Up to the headers of the files and two numbers a layer."""
    made = prepared(results)
    predicted = 6 * bytes_of_layer(made)
    assert list(space_warnings(made)) == []
    run(made.config, command="modegpt")
    assert predicted < stored_bytes(results) < 1.05 * predicted + 10**5

    disk["bytes"] = 0  # nothing more is to be written
    assert list(space_warnings(prepared(results))) == []


@pytest.mark.parametrize("method", [{"name": "asvd"}, {"name": "svd_llm"}])
def test_methods_that_share_input_grams(results: Path, disk: dict[str, int], method: dict[str, Any]) -> None:
    [warning] = space_warnings(prepared(results, method=method, cache=CacheConfig(max_bytes=1)))
    assert "of 6 of 6 layers" in warning


def test_statistics_beyond_the_limit(results: Path, disk: dict[str, int]) -> None:
    made = prepared(results)
    limit = round(2.5 * bytes_of_layer(made))
    [warning] = space_warnings(prepared(results, cache=CacheConfig(max_bytes=limit)))
    assert f"cache.max_bytes is {limit / 1e9:.1f} GB: those of 4 of 6 layers will not be kept" in warning
    disk["bytes"] = limit
    [warning] = space_warnings(made)
    assert "GB free: those of 4 of 6 layers will not be kept" in warning
    assert list(space_warnings(prepared(results, cache=CacheConfig(max_bytes=0)))) == []


def test_a_checkpoint_beyond_the_disk(results: Path, disk: dict[str, int]) -> None:
    made = prepared(results, output=OutputConfig(root=str(results), save_model="auto"), cache=CacheConfig(max_bytes=0))
    size = made.backend.model.num_parameters() * made.backend.model.dtype.itemsize
    disk["bytes"] = size
    assert list(space_warnings(made)) == []
    disk["bytes"] = size // 2
    [warning] = space_warnings(made)
    assert warning.startswith("the checkpoint will take about ") and "only the record will be kept" in warning


def test_the_figure_of_a_7b_model() -> None:
    """31 GB: the MLP's Gram matrices are 11008^2 float64 in each of 32 layers."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32
    )
    with torch.device("meta"):
        sizes = sizes_of(config)
    names = ("mlp.C", "query_key.C_Q", "query_key.C_K", "attention.C_x")
    assert 30e9 < 32 * 8 * sum(STATISTICS[name].num_elements(sizes) for name in names) < 36e9


def test_every_expert_counts() -> None:
    config = dense_model("mixtral").config
    sizes = sizes_of(config)
    assert STATISTICS["experts.C"].num_elements(sizes) == config.num_experts * sizes.n**2 > sizes.n**2
