"""The main job from end to end on the embedded models, and everything it refuses before any work."""

import dataclasses
import errno
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

import modegpt.backend
import modegpt.evaluation.harness_model
import modegpt.evaluation.perplexity
import modegpt.records.store
import modegpt.run
from modegpt.backend import InMemory
from modegpt.config import (
    CalibrationConfig,
    CompressionConfig,
    ModelConfig,
    OutputConfig,
    TrackingConfig,
)
from modegpt.data.embedded import TINY_MODELS
from modegpt.errors import UserError
from modegpt.evaluation.spec import EvaluationSpec, PerplexitySpec, ThroughputSpec, ZeroShotSpec
from modegpt.models.checkpoints import load_model
from modegpt.progress import Progress
from modegpt.records.cost import floor_seconds
from modegpt.records.store import load_record
from modegpt.run import run
from tests.small_run import small


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_a_run_leaves_one_complete_record(
    name: str, results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(results, model=ModelConfig(name=name, path=f"embedded:{name}"))
    path = run(config, command="modegpt ...")
    record = load_record(path)
    assert record["compression"]["achieved_sparsity"] == pytest.approx(0.3, abs=1e-3)
    assert 0 < record["compression"]["whole_model_sparsity"] < 0.3
    assert record["metrics"]["compressed"]["perplexity"]["ppl_jsonl_128"]["value"] >= 1
    assert record["metrics"]["limited"] is True
    assert len(record["compression"]["layers"]) == len(record["compression"]["influence"])
    assert record["calibration"]["num_tokens"] == 512 and len(record["calibration"]["tokens_sha256"]) == 64
    assert {stage["name"] for stage in record["cost"]["stages"]} >= {
        "dense evaluation",
        "influence",
        "decomposition",
        "compressed evaluation",
    }
    assert str(results.parent) not in path.read_text(encoding="utf-8")
    shown = capsys.readouterr().out
    assert "dense" in shown and str(path) in shown and shown.count(".png") == 2
    assert sorted(file.name for file in path.parent.iterdir()) == ["layers.png", "record.json", "scores.png"]

    written = path.read_bytes()
    monkeypatch.setattr(modegpt.run, "execute", lambda *_: pytest.fail("a finished run was computed again"))
    assert run(config, command="modegpt ...") == path and path.read_bytes() == written
    killed, whole = path.with_name("scores.png"), path.with_name("layers.png")
    drawn = whole.stat().st_mtime_ns
    killed.rename(path.with_name(".scores.png.partial"))
    assert run(config, command="modegpt") == path
    assert killed.exists() and not path.with_name(".scores.png.partial").exists()
    assert whole.stat().st_mtime_ns == drawn


def test_a_run_names_its_loops(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    bar = Progress.bar

    def noted(self: Progress, total: int | None, description: str, unit: str = "it") -> Any:
        seen.append(f"{self.label}: {description}" if self.label else description)
        return bar(self, total, description, unit)

    monkeypatch.setattr(Progress, "bar", noted)
    prepared = modegpt.run.prepare(
        small(results, output=OutputConfig(root=str(results), pictures=False)), command="modegpt"
    )
    assert prepared.progress.course.order == ("dense", "compressed")
    modegpt.run.execute(prepared)
    scoring = ["perplexity, windows of 128", "zero-shot tasks"]
    assert seen == [
        *(f"dense: {loop}" for loop in scoring),
        "block influence and statistics",
        "decomposition",
        *(f"compressed: {loop}" for loop in scoring),
    ]
    assert prepared.progress.course.seconds.keys() == {
        "dense",
        "block influence and statistics",
        "decomposition",
        "compressed",
    }


def test_the_bos_is_part_of_what_decides(results: Path) -> None:
    def prepared(bos: str) -> modegpt.run.Run:
        model = ModelConfig(name="tiny-llama", path="embedded:tiny-llama", bos=bos)
        return modegpt.run.prepare(small(results, model=model), command="modegpt")

    usual, each = prepared("auto"), prepared("each_window")
    assert usual.decides == prepared("stream_start").decides
    assert "bos" not in usual.decides["calibration"] and each.decides["calibration"]["bos"] == "each_window"
    assert each.decides["evaluation"]["text"]["bos"] == "each_window"
    assert usual.task is not None and each.task is not None
    ids, own = each.task.calibration.tokens.ids, usual.task.calibration.tokens.ids
    assert ids.shape == own.shape and (ids[:, 0] == each.tokenizer.bos_token_id).all()
    assert not (own[:, 0] == each.tokenizer.bos_token_id).all()


def test_a_limited_text_makes_a_limited_record(results: Path) -> None:
    config = small(results, method={"name": "dense"}, output=OutputConfig(root=str(results), pictures=False))
    config.evaluation.zeroshot = None
    assert config.evaluation.perplexity is not None
    config.evaluation.perplexity.limit = 300
    record = load_record(run(config, command="modegpt"))
    assert record["metrics"]["limited"] is True
    assert record["metrics"]["dense"]["perplexity"]["ppl_jsonl_128"]["num_tokens"] == 300


def test_a_mistyped_local_model_is_no_repository(results: Path) -> None:
    for path in ("models/mistyped", "mistyped"):
        with pytest.raises(UserError, match=f"no model directory at {path}; to ask the hub, set model=hub"):
            run(small(results, model=ModelConfig(name="m", path=path, local=True)), command="modegpt")


def test_overwrite_computes_again_and_keeps_the_old_record(results: Path) -> None:
    path = run(small(results, output=OutputConfig(root=str(results), pictures=False)), command="modegpt")
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]
    first = load_record(path)
    run(small(results, output=OutputConfig(root=str(results), overwrite=True)), command="modegpt")
    assert load_record(path)["metrics"] == first["metrics"]
    assert (path.parent / "superseded-1.json").exists()


def test_what_decides_the_result_decides_the_place(results: Path) -> None:
    def place(**changes: Any) -> Path:
        return modegpt.run.prepare(small(results, **changes), command="modegpt").directory

    base = place()
    text = str(results.parent / "text.jsonl")
    assert place(compression=CompressionConfig(sparsity=0.2)) != base
    assert place(allocation={"name": "uniform"}) != base
    assert place(seed=1) != base
    assert (
        place(calibration=CalibrationConfig(source="jsonl", path=text, num_samples=4, sequence_length=128, seed=3))
        != base
    )
    assert place(quiet=False, tracking=TrackingConfig(mode="offline")) == base
    copy = results.parent / "same text elsewhere.jsonl"
    shutil.copy(text, copy)
    assert (
        place(calibration=CalibrationConfig(source="jsonl", path=str(copy), num_samples=4, sequence_length=128)) == base
    )


def test_what_is_not_scored_is_no_stage(results: Path) -> None:
    """And a machine is measured before and after: the stage is one."""
    nothing = EvaluationSpec(PerplexitySpec(source=None), ZeroShotSpec(tasks=None))
    record = load_record(run(small(results, evaluation=nothing), command="modegpt"))
    stages = [stage["name"] for stage in record["cost"]["stages"]]
    assert not [stage for stage in stages if "evaluation" in stage] and stages.count("machine ceiling") == 1


def test_plus_is_held_against_its_floor(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = load_record(run(small(results, method={"name": "modegpt_plus"}), command="modegpt"))
    seconds = floor_seconds(record["cost"])
    assert set(seconds) == {"forward", "gram", "factorisation"} and min(seconds.values()) > 0
    assert " x its floor of " in (shown := capsys.readouterr().out) or "its floor is not known" in shown


def test_a_saved_model_scores_the_same_later(results: Path) -> None:
    record = load_record(
        run(small(results, output=OutputConfig(root=str(results), save_model="auto")), command="modegpt")
    )
    [checkpoint] = results.glob("runs/*/model")
    again = small(results, model=ModelConfig(name="saved", path=str(checkpoint)), method={"name": "dense"})
    rescored = load_record(run(again, command="modegpt"))
    assert rescored["metrics"]["dense"] == record["metrics"]["compressed"]
    assert rescored["compression"] is None and rescored["calibration"] is None
    with pytest.raises(UserError, match="compressed already"):
        run(small(results, model=ModelConfig(name="saved", path=str(checkpoint))), command="modegpt")


def test_speed_beside_the_dense_model_is_part_of_the_record(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = EvaluationSpec(None, None, ThroughputSpec(decode=["2x8"], repeats=1, decode_tokens=2))
    path = run(small(results, evaluation=spec), command="modegpt")
    record = load_record(path)
    assert [each["model"] for each in record["metrics"]["throughput"]["measurements"]] == ["dense", "compressed"]
    assert (
        record["identity"]["decides"]["throughput"]["num_threads"] == 1
        and record["identity"]["decides"]["throughput"]["device"]
    )
    assert "decode 2 x 8 (tokens/s)" in capsys.readouterr().out
    other = run(
        small(
            results, evaluation=EvaluationSpec(None, None, ThroughputSpec(decode=["1x8"], repeats=1, decode_tokens=2))
        ),
        command="modegpt",
    )
    assert other != path
    unmeasured = load_record(run(small(results, evaluation=EvaluationSpec(None, None)), command="modegpt"))
    assert "throughput" not in unmeasured["metrics"] and "throughput" not in unmeasured["identity"]["decides"]


def test_a_failure_leaves_a_note_that_success_removes(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(InMemory, "compress", lambda *_: (_ for _ in ()).throw(RuntimeError("out of luck")))
        with pytest.raises(RuntimeError):
            run(small(results), command="modegpt")
    [note] = results.glob("runs/*/error.json")
    assert json.loads(note.read_text())["stage"] == "compression" and not list(results.glob("runs/*/record.json"))
    path = run(small(results), command="modegpt")
    assert path.exists() and not note.exists()


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def files_of(results: Path) -> list[str]:
    """Every file below the results, by name, and every folder that hides one."""
    return sorted(path.name for path in results.rglob("*") if path.is_file() or ".partial-" in path.name)


UNSAVED = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    Exception("No space left on device (os error 28)"),  # so say tokenizers
    TypeError("a defect"),
]


@pytest.mark.parametrize("error", UNSAVED, ids=lambda error: type(error).__name__)
def test_a_checkpoint_that_cannot_be_written_does_not_cost_the_record(
    error: Exception, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", broken)  # the weights are there by then
    config = small(results, output=OutputConfig(root=str(results), save_model="auto"))
    with pytest.raises(type(error) if isinstance(error, TypeError) else UserError) as raised:
        run(config, command="modegpt")
    [path] = results.glob("runs/*/record.json")
    if not isinstance(error, TypeError):
        reason = error.strerror if isinstance(error, OSError) else str(error)
        assert (
            str(raised.value)
            == f"cannot save a model to {path.parent / 'model'}: {reason}; the record is whole: {path}"
        )
    assert load_record(path)["metrics"]["compressed"] is not None
    assert files_of(results) == ["layers.png", "record.json", "scores.png"]


def test_a_picture_that_cannot_be_written_does_not_cost_the_record(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(UserError) as raised:
        run(small(results), command="modegpt")
    [path] = results.glob("runs/*/record.json")
    place = path.parent / "scores.png"
    assert str(raised.value) == f"cannot write {place}: No space left on device; the record is whole: {path}"
    assert files_of(results) == ["record.json"] and str(path) in capsys.readouterr().out


def test_a_record_that_cannot_be_written_prints_its_metrics(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(modegpt.records.store, "sync", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*record.json: No space left on device; the metrics .* printed"):
        run(small(results), command="modegpt")
    assert "ppl_jsonl_128" in capsys.readouterr().out
    assert files_of(results) == []


def test_a_cache_that_cannot_be_written_is_said_once(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (results.parent / "file").write_text("")
    monkeypatch.setenv("MODEGPT_CACHE", str(results.parent / "file" / "cache"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        assert load_record(run(small(results), command="modegpt"))["metrics"]["compressed"] is not None
    kept = [str(warning.message) for warning in said if "not kept" in str(warning.message)]
    assert len(kept) == 1 and str(results.parent / "file" / "cache") in kept[0]


def test_the_checkpoint_is_saved_before_it_is_scored(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(results, output=OutputConfig(root=str(results), save_model="auto"))
    with monkeypatch.context() as interrupted:
        interrupted.setattr(InMemory, "score_compressed", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(config, command="modegpt")
    [checkpoint] = results.glob("runs/*/model")
    assert (
        load_model(str(checkpoint)).config.kept_layers and "## Scores" in (card := checkpoint / "README.md").read_text()
    )
    assert json.loads((checkpoint.parent / "error.json").read_text())["stage"] == "compressed evaluation"
    record = load_record(run(config, command="modegpt"))
    value = record["metrics"]["compressed"]["perplexity"]["ppl_jsonl_128"]["value"]
    assert f"{value:.4f} |" in card.read_text(encoding="utf-8")


def test_an_interruption_in_scoring_keeps_the_scores(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does a disk that has no room for the record; what is in the record is not kept twice."""
    score, calls = modegpt.evaluation.harness_model.token_log_likelihoods, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args, **kwargs)

    config = small(results)
    run(dataclasses.replace(config, method={"name": "dense"}), command="modegpt")  # scored before: not counted
    monkeypatch.setattr(modegpt.evaluation.harness_model, "token_log_likelihoods", interrupted)
    config.evaluation.zeroshot.batch_size = 1
    with pytest.raises(KeyboardInterrupt):
        run(config, command="modegpt")
    monkeypatch.setattr(modegpt.evaluation.perplexity, "token_log_likelihoods", lambda *_, **__: pytest.fail("again"))
    with monkeypatch.context() as full:
        full.setattr(modegpt.records.store, "sync", full_disk)
        with pytest.raises(UserError, match="No space left"):
            run(config, command="modegpt")
    found = len(calls)
    record = load_record(run(config, command="modegpt"))
    assert len(calls) == found > 2, "scored again"
    monkeypatch.undo()
    anew = results.parent / "anew"
    config.output.root, config.cache.dir = str(anew), str(anew / "cache")
    assert load_record(run(config, command="modegpt"))["metrics"] == record["metrics"]
    assert not list(results.parent.glob("cache/objects/*/begun.json"))


def test_a_finished_run_saves_the_checkpoint_that_it_was_not_asked_for(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run(small(results), command="modegpt")
    written = path.read_bytes()
    asked = small(results, output=OutputConfig(root=str(results), save_model="auto"))
    with monkeypatch.context() as unscored:
        unscored.setattr(modegpt.backend, "evaluate", lambda *_, **__: pytest.fail("scored again"))
        assert run(asked, command="modegpt") == path and path.read_bytes() == written
    checkpoint = path.parent / "model"
    again = small(results, model=ModelConfig(name="saved", path=str(checkpoint)), method={"name": "dense"})
    record = load_record(path)
    assert load_record(run(again, command="modegpt"))["metrics"]["dense"] == record["metrics"]["compressed"]
    value = record["metrics"]["compressed"]["perplexity"]["ppl_jsonl_128"]["value"]
    assert f"{value:.4f} |" in (checkpoint / "README.md").read_text(encoding="utf-8")

    monkeypatch.setattr(modegpt.run, "compress", lambda *_: pytest.fail("compressed again"))
    assert run(asked, command="modegpt") == path


def test_a_finished_run_saves_no_other_model_than_it_scored(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(small(results), command="modegpt")
    compress = InMemory.compress

    def other(self: InMemory, method: Any, task: Any, target: Any) -> Any:
        return compress(self, method, dataclasses.replace(task, sparsity=0.2), target)

    monkeypatch.setattr(InMemory, "compress", other)
    with pytest.raises(UserError, match=r"other ranks than those of .*record.json.*output.overwrite=true"):
        run(small(results, output=OutputConfig(root=str(results), save_model="auto")), command="modegpt")
    assert not list(results.glob("runs/*/*model*")) and not list(results.glob("runs/*/error.json"))


def test_dense_scores_are_computed_once(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(small(results), command="modegpt")
    labels: list[str] = []
    evaluate = modegpt.backend.evaluate

    def noted(*args: Any, label: str, **kwargs: Any) -> Any:
        labels.append(label)
        return evaluate(*args, label=label, **kwargs)

    monkeypatch.setattr(modegpt.backend, "evaluate", noted)
    run(small(results, compression=CompressionConfig(sparsity=0.1)), command="modegpt")
    assert labels == ["compressed"]


def damaged(results: Path, change: Any) -> ModelConfig:
    """tiny-llama in a directory of its own, its weights changed."""
    directory = results.parent / "damaged"
    shutil.copytree(TINY_MODELS["tiny-llama"], directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return ModelConfig(name="damaged", path=str(directory))


def unknown_family(results: Path) -> ModelConfig:
    directory = results.parent / "bert"
    directory.mkdir(parents=True)
    shutil.copytree(TINY_MODELS["tiny-llama"], directory, dirs_exist_ok=True)
    (directory / "config.json").write_text(
        json.dumps({"model_type": "bloom", "vocab_size": 128, "hidden_size": 16, "n_layer": 1, "n_head": 2})
    )
    return ModelConfig(name="bloom", path=str(directory))


def short_text(results: Path) -> str:
    path = results.parent / "short.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"text": "Too short."}\n')
    return str(path)


REFUSED = {
    "unknown family": (lambda r: {"model": unknown_family(r)}, "bloom.*supported are.*llama.*opt"),
    "missing path": (lambda r: {"model": ModelConfig(name="gone", path=str(r / "gone"))}, "gone"),
    "hub name without network": (
        lambda r: {"model": ModelConfig(name=None, path="someone/some-model")},
        "model=local model.path",
    ),
    "too few tokens": (
        lambda r: {"calibration": CalibrationConfig(source="tiny", num_samples=10**6)},
        "lower calibration.num_samples",
    ),
    "sequence beyond the context": (
        lambda r: {"calibration": CalibrationConfig(source="tiny", sequence_length=4096)},
        "context",
    ),
    "speed of a model on several devices": (
        lambda r: {
            "model": ModelConfig(name="m", path="embedded:tiny-llama", device_map="auto"),
            "method": {"name": "dense"},
            "evaluation": EvaluationSpec(None, None, ThroughputSpec(decode=["1x8"])),
        },
        "measured on one device",
    ),
    "speed beyond the context": (
        lambda r: {"evaluation": EvaluationSpec(None, None, ThroughputSpec(prefill=["1x4096"]))},
        "evaluation.throughput.prefill: 1x4096 needs 4096 tokens",
    ),
    "text shorter than a window": (
        lambda r: {
            "evaluation": EvaluationSpec(PerplexitySpec(source="jsonl", path=short_text(r), windows=[128]), None)
        },
        "short.jsonl",
    ),
    "window beyond the context": (
        lambda r: {"evaluation": EvaluationSpec(PerplexitySpec(source="tiny", windows=[4096]), None)},
        "4096",
    ),
    "unknown task": (
        lambda r: {"evaluation": EvaluationSpec(None, ZeroShotSpec(tasks=["tiny_storey"]))},
        "tiny_storey.*tiny_story",
    ),
    "rank of zero": (
        lambda r: {"compression": CompressionConfig(sparsity=0.99), "allocation": {"name": "uniform"}},
        "rank of zero",
    ),
    "epsilon": (lambda r: {"allocation": {"name": "entropic", "epsilon": -1.0}}, "epsilon"),
    "NaN in weights": (
        lambda r: {"model": damaged(r, lambda t: t["model.layers.2.mlp.up_proj.weight"].fill_(float("nan")))},
        r"layers\.2\.mlp\.up_proj",
    ),
    "missing weight": (
        lambda r: {"model": damaged(r, lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"))},
        r"layers\.1\.self_attn\.q_proj",
    ),
    "output that is a file": (lambda r: {"output": OutputConfig(root=short_text(r))}, "not a directory"),
    "unknown method": (lambda r: {"method": {"name": "slicegtp"}}, "did you mean slicegpt"),
    "option without effect": (
        lambda r: {"method": {"name": "svd"}, "compression": CompressionConfig(skip_layers=[0])},
        "no effect with method=svd",
    ),
    "layer sparsities without explicit": (
        lambda r: {"compression": CompressionConfig(layer_sparsity=[0.1] * 6)},
        "allocation=explicit",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_any_work(case: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, message = REFUSED[case]
    monkeypatch.setattr(modegpt.backend, "evaluate", lambda *_, **__: pytest.fail("scored before refusing"))
    with pytest.raises(UserError, match=message) as refused:
        run(small(results, **changes(results)), command="modegpt")
    assert "\n" not in str(refused.value)
    assert not list(results.glob("**/record.json"))


def test_activations_that_are_not_finite_name_their_layer(results: Path) -> None:
    model = damaged(results, lambda tensors: tensors["model.layers.3.mlp.down_proj.weight"].fill_(3e38))
    with pytest.raises(UserError, match="decoder layer 3"):
        run(small(results, model=model), command="modegpt")
    with pytest.raises(UserError, match=r"NaN|inf"):
        run(small(results, model=model, method={"name": "dense"}), command="modegpt")
    assert not list(results.glob("**/record.json"))
