"""What of a compression goes into its record: a target that was missed is never silent, whatever the method."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modegpt.allocation.policies import Uniform
from modegpt.config import CompressionConfig
from modegpt.decompositions import MLPNystrom, QueryKeyCR, ValueOutputSVD
from modegpt.evaluation.spec import EvaluationSpec, PerplexitySpec, ThroughputSpec, ZeroShotSpec
from modegpt.methods.base import Method
from modegpt.methods.flap import FLAP
from modegpt.methods.llm_pruner import LLMPruner
from modegpt.methods.modegpt import MoDeGPT
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.methods.shortgpt import ShortGPT
from modegpt.methods.slicegpt import SliceGPT
from modegpt.methods.svd import SVD
from modegpt.models import decoder_layers
from modegpt.records import recording
from modegpt.records.recording import compression_facts, make_record, model_name, run_name, speed_decides
from modegpt.records.store import RecordStore
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


def scores(accuracy: float, perplexity: float) -> dict[str, Any]:
    entry = {"window": 8, "num_windows": 1, "num_predicted_tokens": 7, "mean_nll": 1.0}
    return {
        "perplexity": {"ppl_text_8": {"value": perplexity, **entry}},
        "zeroshot": {"pronouns": {"metric": "acc", "value": accuracy, "num_items": 9}},
    }


def test_a_record_says_what_was_asked_seen_and_removed(tmp_path: Path) -> None:
    base = small(tmp_path / "results", seed=5, method={"name": "shortgpt"})
    config = replace(
        base,
        calibration=replace(base.calibration, seed=3),
        compression=CompressionConfig(sparsity=1 / 3, target_bytes="1GB", target_context=0),
        output=replace(base.output, experiment="trial"),
        evaluation=EvaluationSpec(PerplexitySpec(source="jsonl"), None),
    )
    task = task_of(dense_model("llama"), 1 / 3)
    given: dict[str, Any] = {
        "command": "modegpt seed=5",
        "name": "a run",
        "decides": {"model": {"weights_sha256": "w", "tokenizer_sha256": "t"}, "seed": 5},
        "model": task.model,
        "dense_scores": scores(0.8, 4.0),
        "cost": {"stages": [], "peak_memory_bytes": {}, "forward_passes": 1, "backward_passes": 0}
        | {"calibration_tokens": 160},
        "commits": {"model": "c"},
    }
    compressed = replace(ShortGPT().compress(task), target={"target_bytes": 10**9, "achieved_bytes": 5})
    record = make_record(
        config,
        **given,
        tokens=task.calibration.tokens,
        compressed=compressed,
        compressed_scores=scores(0.6, 6.0),
        speeds={"measurements": []},
    )
    weights = [parameter.numel() for parameter in task.model.parameters()]
    layer = sum(parameter.numel() for parameter in decoder_layers(task.model)[0].parameters())
    norms = 2 * task.model.config.hidden_size
    [dropped] = compressed.details["dropped_layers"]
    assert record["seeds"] == {"seed": 5, "calibration": 3} and record["experiment"] == "trial"
    assert record["model"] | {"name": "tiny-llama", "family": "llama", "dtype": "float32"} == record["model"]
    assert record["model"]["num_parameters"] == sum(weights)
    assert record["model"]["block_linear_parameters"] == 3 * (layer - norms)
    tokens = task.calibration.tokens
    assert record["calibration"] == {
        "source": "jsonl",
        "num_samples": 8,
        "sequence_length": 20,
        "seed": 3,
        "num_tokens": 160,
        "tokens_sha256": tokens.sha256,
        "stream_tokens": 160,
    }
    facts = record["compression"]
    assert (facts["method"], facts["target_sparsity"]) == ("shortgpt", 1 / 3)
    assert facts["achieved_sparsity"] == pytest.approx(1 / 3)
    assert facts["whole_model_sparsity"] == pytest.approx(layer / sum(weights))
    assert facts["num_parameters"] == sum(weights) - layer
    assert (facts["target_bytes"], facts["achieved_bytes"]) == (10**9, 5)
    assert facts["full_ranks"] == {"mlp": 40, "query_key": 8, "value_output": 8}
    assert facts["influence"] == compressed.influence and "warnings" not in facts and "recovery" not in facts
    assert [each["index"] for each in facts["layers"]] == [0, 1, 2]
    assert [each["sparsity"] for each in facts["layers"]] == [float(index == dropped) for index in range(3)]
    metrics = record["metrics"]
    assert metrics["retention"] == {"pronouns": pytest.approx(0.75)}
    assert metrics["perplexity_increase"] == {"ppl_text_8": 1.5} and metrics["limited"] is False
    assert metrics["throughput"] == {"measurements": []} and record["provenance"]["hub"] == {"model": "c"}
    limited = replace(config, evaluation=EvaluationSpec(None, ZeroShotSpec(tasks=["tiny_pronoun"], limit=4)))
    dense = make_record(
        limited, **given | {"commits": {}}, tokens=None, compressed=None, compressed_scores=None, speeds=None
    )
    assert dense["calibration"] is dense["compression"] is dense["metrics"]["compressed"] is None
    assert dense["metrics"]["limited"] and dense["metrics"]["retention"] == {} and "hub" not in dense["provenance"]
    assert "throughput" not in dense["metrics"]
    for each in (record, dense):
        RecordStore(tmp_path / "store").write(each | {"name": str(each["metrics"]["limited"])})


def test_a_record_warns_of_what_the_method_warned_and_names_the_layers_that_it_says_nothing_of() -> None:
    task = task_of(dense_model("llama"), 0.3)
    compressed = replace(METHODS[0].compress(task), warnings=["spread far"], recovery={"name": "lora"})
    compressed.layers.pop(1)
    facts = compression_facts(task.model, compressed, method="m", target_sparsity=0.3)
    assert facts["warnings"] == ["spread far"] and facts["recovery"] == {"name": "lora"}
    silent = facts["layers"][1]
    assert silent == {"index": 1, "sparsity": silent["sparsity"], "ranks": {}, "relative_error": {}, "numerics": {}}
    left, dense = (
        sum(weight.numel() for weight in decoder_layers(model)[1].parameters() if weight.ndim == 2)
        for model in (compressed.model, task.model)
    )
    assert silent["sparsity"] == pytest.approx(1 - left / dense, rel=1e-12) and 0.2 < silent["sparsity"] < 0.4
    assert facts["layers"][2]["ranks"] == compressed.layers[1]["ranks"]
    target = {"target_bytes": 5, "achieved_bytes": 7}
    in_bytes = compression_facts(task.model, replace(compressed, target=target), method="m", target_sparsity=0.3)
    assert in_bytes["target_bytes"] == 5 and "7 bytes needed, 5 asked" in in_bytes["warnings"][-1]


@pytest.mark.parametrize(
    ("device", "processor"), [("cpu", "A processor"), ("cuda", "First"), ("cuda:0", "First"), ("cuda:1", "Second")]
)
def test_speeds_are_of_the_processor_that_ran(device: str, processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"cpu": "A processor", "gpus": [{"name": "First"}, {"name": "Second"}], "num_threads": 3}
    monkeypatch.setattr(recording, "hardware", lambda: parts)
    decided = speed_decides(ThroughputSpec(repeats=2), device)
    assert (decided["device"], decided["num_threads"], decided["repeats"]) == (processor, 3, 2)


def test_a_model_without_a_name_has_that_of_its_path(tmp_path: Path) -> None:
    config = small(tmp_path / "results")
    assert model_name(config) == "tiny-llama"
    for path in ("org/some-model", "models/some-model/", "some-model"):
        assert model_name(replace(config, model=replace(config.model, name="", path=path))) == "some-model"
