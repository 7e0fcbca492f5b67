"""Whole runs out of core: the same record and checkpoint as in memory, killed or not, and what is refused."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import modegpt.run
from modegpt.config import OutOfCoreConfig, OutputConfig, RunConfig
from modegpt.errors import UserError
from modegpt.evaluation.spec import EvaluationSpec, PerplexitySpec, ThroughputSpec, ZeroShotSpec
from modegpt.models.checkpoints import load_model
from modegpt.models.integrity import MANIFEST, check_files, fingerprint_weights
from modegpt.records.store import load_record
from modegpt.run import run
from modegpt.streaming.job import OutOfCore
from tests.processes import CLEAN, killed_when
from tests.small_run import small

OUT_OF_CORE = OutOfCoreConfig(enabled=True)


def perplexity_alone(folder: Path) -> EvaluationSpec:
    return EvaluationSpec(
        PerplexitySpec(source="jsonl", path=str(folder / "text.jsonl"), windows=[128]), ZeroShotSpec(tasks=None)
    )


def streamed(results: Path, place: str, **changes: Any) -> Any:
    output = OutputConfig(root=str(results), experiment=place, save_model="auto", pictures=False)
    return small(
        results,
        **{"evaluation": perplexity_alone(results.parent), "output": output, "out_of_core": OUT_OF_CORE, **changes},
    )


def run_and_die(config: RunConfig, cache: str) -> None:
    os.environ["MODEGPT_CACHE"] = cache
    killed_when(OutOfCore, "score_compressed", lambda *_, **__: True, after=True)
    run(config, command="modegpt")


def test_a_run_killed_and_started_again_is_the_run_in_memory(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = streamed(results, "streamed")

    process = CLEAN.Process(target=run_and_die, args=(config, os.environ["MODEGPT_CACHE"]))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL and not list(results.rglob("record.json"))
    config.quiet = False
    path = run(config, command="modegpt")
    shown = capsys.readouterr().out
    assert "going on from layer" in shown and "out of core: at most" in shown
    memory = run(streamed(results, "memory", out_of_core=OutOfCoreConfig()), command="modegpt")
    ours, theirs = load_record(path), load_record(memory)
    details = ours["compression"]["details"].pop("out_of_core")
    assert details["layers_found_finished"] == len(ours["compression"]["layers"])
    assert (
        details["measured_peak_bytes"]["host"] > 0
        and details["predicted_peak_bytes"]["host"]["total"] <= details["available_bytes"]["host"]
    )
    for part in ("identity", "metrics", "compression", "calibration", "model"):
        assert ours[part] == theirs[part], part
    models = [place.parent / "model" for place in (path, memory)]
    for model in models:
        check_files(model)
        assert (model / MANIFEST).is_file()
    assert fingerprint_weights(load_model(str(models[0]))) == fingerprint_weights(load_model(str(models[1])))
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["model", "record.json"]
    assert str(path) == str(run(config, command="modegpt"))


def test_plus_is_the_run_in_memory(results: Path) -> None:
    plus = {"method": {"name": "modegpt_plus"}}
    disk = OutOfCoreConfig(enabled=True, hidden_states="disk")
    ours, theirs = (
        load_record(run(streamed(results, place, **plus, out_of_core=where), command="modegpt"))
        for place, where in (("streamed", disk), ("memory", OutOfCoreConfig()))
    )
    details = ours["compression"]["details"].pop("out_of_core")
    assert details["measured_peak_bytes"]["host"] <= details["predicted_peak_bytes"]["host"]["total"]
    assert ours["compression"]["details"]["inverse_temperature"] != 1.0
    for part in ("identity", "metrics", "compression", "calibration", "model"):
        assert ours[part] == theirs[part], part


@pytest.mark.parametrize(
    "changes, cause",
    [
        ({"method": {"name": "modegpt_plus", "rounds": 1}}, "method.rounds=1 needs the whole model in memory"),
        ({"method": {"name": "slicegpt"}}, "needs the whole model in memory"),
        ({"method": {"name": "dense"}}, "needs the whole model in memory"),
        ({"output": OutputConfig(root=os.devnull + "-none")}, "output.save_model"),
        (
            {"evaluation": EvaluationSpec(PerplexitySpec(source=None), ZeroShotSpec(tasks=["tiny_pronoun"]))},
            "zero-shot tasks",
        ),
        (
            {"evaluation": EvaluationSpec(None, None, ThroughputSpec(decode=["1x8"]))},
            "goes without evaluation.throughput",
        ),
        ({"out_of_core": OutOfCoreConfig(enabled=True, max_host_bytes=2**20)}, "GiB are available"),
    ],
)
def test_what_cannot_be_streamed_is_refused_in_one_line(changes: dict[str, Any], cause: str, results: Path) -> None:
    if "output" in changes:
        changes = {"output": OutputConfig(root=str(results), save_model=None)}
    with pytest.raises(UserError, match=cause) as error:
        modegpt.run.prepare(streamed(results, "refused", **changes), command="modegpt")
    assert "\n" not in str(error.value)
