"""What of a compression goes into its record: a target that was missed is never silent, whatever the method."""

from dataclasses import replace
from pathlib import Path

import pytest

from modegpt.allocation.policies import Uniform
from modegpt.decompositions import MLPNystrom, QueryKeyCR, ValueOutputSVD
from modegpt.methods.base import Method
from modegpt.methods.flap import FLAP
from modegpt.methods.llm_pruner import LLMPruner
from modegpt.methods.modegpt import MoDeGPT
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.methods.shortgpt import ShortGPT
from modegpt.methods.slicegpt import SliceGPT
from modegpt.methods.svd import SVD
from modegpt.records.recording import compression_facts, run_name
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model
from tests.small_run import small

METHODS = [
    MoDeGPT(MLPNystrom(), QueryKeyCR(), ValueOutputSVD(), Uniform()),
    MoDeGPTPlus(),
    MoDeGPTPlus(cap=0.3),
    FLAP(),
    LLMPruner(),
    ShortGPT(),
    SliceGPT(),
    SVD(),
]


@pytest.mark.parametrize("sparsity", [0.0, 1 / 3, 0.45])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_missed_target_is_in_the_record(method: Method, sparsity: float) -> None:
    task = task_of(dense_model("llama"), sparsity)
    facts = compression_facts(task.model, method.compress(task), method="m", target_sparsity=sparsity)
    missed = abs(facts["achieved_sparsity"] - sparsity) > 0.001
    assert [f"{facts['achieved_sparsity']:.2%} of" in warning for warning in facts.get("warnings", [])] == [
        True
    ] * missed


def test_some_of_these_miss_and_some_do_not() -> None:
    """Else the test above could not fail: whole layers cannot be 45 %, nor can modules capped at 30 %."""
    task = task_of(dense_model("llama"), 0.45)
    number = {
        type(method): len(
            compression_facts(task.model, method.compress(task), method="m", target_sparsity=0.45).get("warnings", [])
        )
        for method in (ShortGPT(), MoDeGPTPlus(cap=0.3), FLAP())
    }
    assert number == {ShortGPT: 1, MoDeGPTPlus: 1, FLAP: 0}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "tiny-llama-modegpt-entropic-s30-seed3"),
        ({"method": {"name": "shortgpt"}}, "tiny-llama-shortgpt-s30-seed3"),
        ({"method": {"name": "dense"}}, "tiny-llama-dense"),
    ],
)
def test_a_run_is_named_by_what_tells_it_from_its_neighbours(tmp_path: Path, changes: dict, name: str) -> None:
    config = small(tmp_path / "results", **changes)
    seeded = replace(
        config,
        calibration=replace(config.calibration, seed=3),
        compression=replace(config.compression, sparsity=0.3),
    )
    assert run_name(seeded, recovery=None) == name
    assert run_name(seeded, recovery="lora") == f"{name}-lora"
