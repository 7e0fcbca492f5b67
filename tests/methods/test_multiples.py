"""The rank multiples that a device likes, where none are given."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from modegpt.config import CompressionConfig, DecompositionConfig, ModelConfig, RankMultiple, RunConfig, defaults
from modegpt.methods.multiples import preferred_multiples
from modegpt.methods.registry import decides, make_method, settled
from modegpt.methods.slicegpt import SliceGPT
from tests.models.family_table import CONFIGS

LLAMA_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
EVEN = {"mlp": 1, "query_key": 1, "value_output": 1}
PAPER = DecompositionConfig(mlp={"name": "nystrom"}, query_key={"name": "none"}, value_output={"name": "svd"})


def config(method: str = "random", **multiples: int) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name="m", path="m"),
        method={"name": method},
        compression=CompressionConfig(rank_multiple=RankMultiple(**multiples)),
    )


def test_a_gpu_gets_whole_tiles_and_a_cpu_the_exact_budget() -> None:
    assert preferred_multiples("cuda:1", LLAMA_7B) == {"mlp": 64, "query_key": 16, "value_output": 16}
    assert preferred_multiples("cpu", LLAMA_7B) == EVEN


def test_small_modules_keep_ranks_to_choose_from() -> None:
    small = LlamaConfig(hidden_size=64, intermediate_size=172, num_attention_heads=8)
    assert preferred_multiples("cuda", small) == {"mlp": 16, "query_key": 1, "value_output": 1}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_has_them(name: str) -> None:
    assert all(multiple >= 1 for multiple in preferred_multiples("cuda", CONFIGS[name]).values())


def test_what_is_given_stays() -> None:
    done = settled(config(mlp=8), device="cuda", model_config=LLAMA_7B)
    assert vars(done.compression.rank_multiple) == {"mlp": 8, "query_key": 16, "value_output": 16}
    assert make_method(done).rank_multiple == vars(done.compression.rank_multiple)


def test_the_default_on_a_cpu_is_the_run_with_ones() -> None:
    ones = config(**EVEN)
    assert decides(settled(config(), device="cpu", model_config=LLAMA_7B)) == decides(ones)
    assert settled(ones, device="cuda", model_config=LLAMA_7B) == ones


@pytest.mark.parametrize("method", ["dense", "slicegpt"])
def test_methods_without_ranks_are_left_alone(method: str) -> None:
    asked = config(method)
    assert settled(asked, device="cuda", model_config=LLAMA_7B).compression == asked.compression


def test_a_settled_configuration_says_every_option() -> None:
    done = settled(config("slicegpt"), device="cpu", model_config=LLAMA_7B)
    assert done.method == {"name": "slicegpt", **defaults(SliceGPT)}
    asked = replace(config("modegpt"), allocation={"name": "entropic"}, decomposition=PAPER)
    done = settled(asked, device="cpu", model_config=LLAMA_7B)
    assert done.allocation == {"name": "entropic", "epsilon": 0.1, "cap": 0.8}
    assert done.decomposition.mlp == {"name": "nystrom", "ridge": 0.01}
    assert done.decomposition.query_key == {"name": "none"}
    assert decides(done) == decides(asked) | {"compression": decides(done)["compression"]}
