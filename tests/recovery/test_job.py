"""Recovery in the main job: before and after in the record, an identity of its own, and what it refuses."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from modegpt.config import CalibrationConfig, ModelConfig, OutOfCoreConfig, OutputConfig, RunConfig, TrackingConfig
from modegpt.data.texts import Documents
from modegpt.errors import UserError
from modegpt.evaluation.spec import EvaluationSpec, PerplexitySpec
from modegpt.records.frame import row
from modegpt.records.store import RecordStore, identity, load_record
from modegpt.records.summary import summary
from modegpt.recovery.job import shared_share
from modegpt.run import prepare, run

LORA = {"name": "lora", "rank": 2, "learning_rate": 1e-2, "num_samples": 4, "sequence_length": 64, "batch_size": 1}


@pytest.fixture
def results(results: Path) -> Path:
    """A place for records, with a text to train on and one to be scored on beside it."""
    for name, sentence in (
        ("train", "The old baker walked to the market and bought two apples . "),
        ("test", "A young girl ran to the lake and saw a boat . "),
    ):
        lines = [json.dumps({"text": f"{number} {sentence * 20}"}) for number in range(8)]
        (results.parent / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return results


def config(results: Path, recovery: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    folder = results.parent
    settings: dict[str, Any] = {
        "quiet": True,
        "model": ModelConfig(name="tiny-llama", path="embedded:tiny-llama"),
        "method": {"name": "magnitude"},
        "calibration": CalibrationConfig(
            source="jsonl", path=str(folder / "train.jsonl"), num_samples=4, sequence_length=64
        ),
        "evaluation": EvaluationSpec(
            PerplexitySpec(source="jsonl", path=str(folder / "test.jsonl"), windows=[64]), None
        ),
        "output": OutputConfig(root=str(results), pictures=False),
        "tracking": TrackingConfig(mode="disabled"),
    }
    return RunConfig(**settings | ({} if recovery is None else {"recovery": recovery}) | changes)


def test_before_and_after_are_recorded(results: Path) -> None:
    without = load_record(run(config(results), command="modegpt"))
    path = run(
        config(results, LORA, output=OutputConfig(root=str(results), pictures=False, save_model="auto")),
        command="modegpt recovery=lora",
    )
    record = load_record(path)
    assert path.parent.name.startswith("tiny-llama-magnitude-s30-seed0-lora-mlp-")
    recovery = record["compression"]["recovery"]
    assert recovery["before"] == without["metrics"]["compressed"]
    assert recovery["num_steps"] == 4 and len(recovery["losses"]) == 4
    assert recovery["shared_with_test"] == 0 and recovery["rank"] == 2 and len(recovery["tokens_sha256"]) == 64
    [(name, after)] = record["metrics"]["compressed"]["perplexity"].items()
    before = recovery["before"]["perplexity"][name]["value"]
    assert after["value"] < 0.9 * before, "similar text, many steps: it must help"
    assert record["metrics"]["perplexity_increase"][name] == pytest.approx(
        after["value"] / record["metrics"]["dense"]["perplexity"][name]["value"]
    )
    assert record["compression"]["num_parameters"] == without["compression"]["num_parameters"], (
        "adapters are merged, not kept beside"
    )
    assert {stage["name"] for stage in record["cost"]["stages"]} >= {"recovery", "recovered evaluation"}
    facts = row(record)
    assert (facts["recovery"], facts["recovery_targets"], facts[f"before_{name}"], facts[name]) == (
        "lora",
        "mlp",
        before,
        after["value"],
    )
    plain = row(without)
    assert plain["recovery"] == "none" and plain["recovery_targets"] is None and f"before_{name}" not in plain
    assert f"{before:,.2f}" in summary(record) and "recovery" in summary(record) and "recovery" not in summary(without)

    saved = ModelConfig(name="saved", path=str(path.parent / "model"))
    again = load_record(run(config(results, model=saved, method={"name": "dense"}), command="modegpt"))
    assert again["metrics"]["dense"]["perplexity"][name]["value"] == after["value"], (
        "the checkpoint is the recovered model"
    )
    weights = path.parent / "model" / "model.safetensors"
    bits = weights.read_bytes()
    shutil.rmtree(weights.parent)
    settings = config(results, LORA, output=OutputConfig(root=str(results), pictures=False, save_model="auto"))
    assert run(settings, command="modegpt") == path and weights.read_bytes() == bits, "trained again, not scored"


def test_runs_without_recovery_keep_their_identity(results: Path, repository: Path) -> None:
    decides = prepare(config(results), command="modegpt").decides
    assert "recovery" not in decides and decides["calibration"].keys() == {"tokens_sha256", "precision"}
    records = RecordStore(repository / "results").records("variants")
    name = "tiny-llama-modegpt-columns-cr-svd-uniform-s10-seed0"
    recorded = next(record for _, record in records if record["name"] == name)
    options = recorded["config"]
    old = config(
        results,
        method=options["method"],
        allocation=options["allocation"],
        calibration=CalibrationConfig(),
        evaluation=EvaluationSpec(PerplexitySpec(source="tiny"), None),
    )
    old.compression.sparsity = 0.1
    for module, chosen in options["decomposition"].items():
        setattr(old.decomposition, module, chosen)
    assert identity(prepare(old, command="modegpt").decides) == recorded["identity"]["hash"]


def test_what_decides_a_recovery_is_in_its_identity(results: Path) -> None:
    def place(**changes: Any) -> Path:
        return prepare(config(results, LORA | changes), command="modegpt").directory

    base = place()
    assert base != prepare(config(results), command="modegpt").directory
    assert place(micro_batch_size=1) == base
    for change in ({"rank": 4}, {"targets": "all"}, {"num_samples": 5}, {"learning_rate": 1e-3}, {"epochs": 2}):
        assert place(**change) != base
    assert (
        prepare(config(results, LORA, seed=1), command="modegpt").decides["calibration"]
        != prepare(config(results, LORA), command="modegpt").decides["calibration"]
    )


def test_the_test_text_is_never_trained_on(results: Path) -> None:
    train = results.parent / "train.jsonl"
    leaked = train.read_text(encoding="utf-8").splitlines()[:4]
    train.write_text(
        "\n".join([*leaked, *(results.parent / "test.jsonl").read_text(encoding="utf-8").splitlines()[:4]]),
        encoding="utf-8",
    )
    prepare(config(results), command="modegpt")
    with pytest.raises(
        UserError, match="recovery=lora would train on the test text: 50 % of it stands in the calibration text"
    ):
        prepare(config(results, LORA), command="modegpt")


def test_the_shared_share_counts_characters_of_whole_long_documents() -> None:
    long, other, heading = "x" * 300, "y" * 100, "= Title ="
    train = Documents("x", (long + "\n", heading, "z" * 200))
    assert shared_share(train, Documents("x", (long, other, heading))) == 0.75
    assert shared_share(train, Documents("x", (heading,))) == 0


@pytest.mark.parametrize(
    ("recovery", "changes", "message"),
    [
        ({"name": "magic"}, {}, "recovery.name=magic is not known; choose from lora"),
        (LORA | {"ranks": 2}, {}, "recovery.ranks is not known; choose from .*did you mean rank"),
        (LORA | {"targets": "attention"}, {}, "recovery.targets=attention has the wrong type"),
        (LORA | {"num_samples": 1000}, {}, "recovery asks for 1000 x 64 .* lower recovery.num_samples to"),
        (LORA | {"sequence_length": 4096}, {}, "recovery.sequence_length=4096 is longer than the model's context"),
        (LORA, {"method": {"name": "dense"}}, "recovery=lora has no effect with method=dense"),
        (
            LORA,
            {"out_of_core": OutOfCoreConfig(enabled=True)},
            "recovery=lora trains the whole compressed model in memory",
        ),
    ],
)
def test_refusals_come_before_any_work(
    recovery: dict, changes: dict, message: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modegpt.streaming.job.OutOfCore.open", lambda *args, **kwargs: pytest.fail("opened"))
    with pytest.raises(UserError, match=message):
        prepare(config(results, recovery, **changes), command="modegpt")


def test_a_missing_peft_is_said_at_once(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "peft" else find(name, *args))
    with pytest.raises(UserError, match=r"recovery=lora needs peft: pip install 'modegpt\[recovery\]'"):
        prepare(config(results, LORA), command="modegpt")
