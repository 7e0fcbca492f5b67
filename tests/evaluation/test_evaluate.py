"""Preparation refuses early; scoring gives one record form; retention compares two of them."""

import copy
import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from modegpt.errors import UserError
from modegpt.evaluation.begun import Begun
from modegpt.evaluation.dense_cache import dense_key
from modegpt.evaluation.evaluate import PreparedEvaluation, evaluate, prepare_evaluation, retention
from modegpt.evaluation.spec import EvaluationSpec, PerplexitySpec, ZeroShotSpec
from modegpt.progress import Progress

QUIET = Progress(quiet=True)


@pytest.fixture
def text_path(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"Story {number}: the cat sat down."}) + "\n" for number in range(12)))
    return str(path)


@pytest.fixture
def spec(text_path, task_folder):
    return EvaluationSpec(
        perplexity=PerplexitySpec(source="jsonl", path=text_path, windows=[16, 64]),
        zeroshot=ZeroShotSpec(tasks=["arc_easy", "winogrande"], data_path=str(task_folder)),
    )


def prepare(spec, tokenizer, model):
    return prepare_evaluation(spec, tokenizer=tokenizer, model_config=model.config)


def test_record_form(spec, tokenizer, model):
    prepared = prepare(spec, tokenizer, model)
    model.train()
    scores = evaluate(model, prepared, label="dense", progress=QUIET)
    assert not model.training
    assert list(scores["perplexity"]) == ["ppl_jsonl_16", "ppl_jsonl_64"] and list(scores["zeroshot"]) == [
        "arc_easy",
        "winogrande",
        "mean",
    ]
    assert scores["perplexity"]["ppl_jsonl_16"]["num_tokens"] == prepared.text.token_ids.numel()
    assert scores["perplexity"]["ppl_jsonl_16"]["tokens_sha256"] == prepared.text.sha256
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert evaluate(model, prepared, label="again", progress=QUIET) == scores
    assert tokenizer.pad_token_id is None  # the harness's choice of a padding token stays its own


def test_perplexity_is_said_first(spec, tokenizer, model, monkeypatch):
    said = []
    monkeypatch.setattr(Progress, "say", lambda self, line: said.append(line))
    evaluate(model, prepare(spec, tokenizer, model), label="dense", progress=QUIET)
    assert said[0].startswith("dense: ppl_jsonl_16 = ") and said[1].startswith("dense: ppl_jsonl_64 = ")


@pytest.mark.parametrize("part", ["perplexity", "zeroshot"])
def test_a_section_left_out_is_not_scored(spec, tokenizer, model, part):
    other = {"perplexity": "zeroshot", "zeroshot": "perplexity"}[part]
    empty = {"perplexity": PerplexitySpec(), "zeroshot": ZeroShotSpec()}[part]
    for nothing in (None, empty):
        setattr(spec, part, nothing)
        scores = evaluate(model, prepare(spec, tokenizer, model), label="x", progress=QUIET)
        assert scores[part] == {} and scores[other]


def test_refused_before_any_forward_pass(spec, tokenizer, model, tmp_path):
    def refused(message: str, **changes) -> None:
        changed = copy.deepcopy(spec)
        for key, value in changes.items():
            setattr(changed.perplexity if hasattr(changed.perplexity, key) else changed.zeroshot, key, value)
        with pytest.raises(UserError, match=message):
            prepare(changed, tokenizer, model)

    (tmp_path / "short.txt").write_text("ten chars.")
    refused("longer than the model's context of 64", windows=[128])
    refused(
        "short.txt holds 11 tokens, less than one window of 64",
        source="text",
        path=str(tmp_path / "short.txt"),
        windows="auto",
    )
    refused("cannot read", path=str(tmp_path / "absent"))
    refused("unknown text source", source="wiki")
    refused("is not a folder", data_path=str(tmp_path / "absent"))
    refused("not read from local files", tasks=["nonsense"])
    small = copy.deepcopy(model.config)
    small.vocab_size = 20
    with pytest.raises(UserError, match="do not belong together"):
        prepare_evaluation(spec, tokenizer=tokenizer, model_config=small)


def test_fingerprint_is_of_what_is_asked_not_how(spec, tokenizer, model, text_path):
    reference = prepare(spec, tokenizer, model).fingerprint()
    again = copy.deepcopy(spec)
    again.perplexity.batch_tokens, again.zeroshot.batch_size = 17, 3
    assert prepare(again, tokenizer, model).fingerprint() == reference
    for change in ("windows", "limit", "text"):
        changed = copy.deepcopy(spec)
        if change == "windows":
            changed.perplexity.windows = [16]
        elif change == "limit":
            changed.zeroshot.limit = 2
        else:
            with open(text_path, "a") as file:
                file.write('{"text": "One more."}\n')
        assert prepare(changed, tokenizer, model).fingerprint() != reference, change


def test_a_limit_scores_the_beginning_of_the_text(spec, tokenizer, model):
    whole = prepare(spec, tokenizer, model)
    spec.perplexity.limit, spec.perplexity.windows = 40, [16]
    begun = prepare(spec, tokenizer, model)
    assert begun.text.token_ids.tolist() == whole.text.token_ids[:40].tolist()
    assert begun.fingerprint()["text"]["sha256"] != whole.fingerprint()["text"]["sha256"]
    score = evaluate(model, begun, label="x", progress=QUIET)["perplexity"]["ppl_jsonl_16"]
    assert score["num_windows"] == 2 and score["num_tokens"] == 40


def test_windows_that_begin_with_a_bos_are_another_figure(spec, tokenizer, model):
    spec.zeroshot, spec.perplexity.windows = None, [16]
    given = {"tokenizer": tokenizer, "model_config": model.config}
    usual, each = prepare_evaluation(spec, **given), prepare_evaluation(spec, bos="each_window", **given)
    assert usual.fingerprint() == prepare_evaluation(spec, bos="stream_start", **given).fingerprint()
    assert usual.fingerprint()["text"].keys() == {"source", "sha256", "windows"}, (
        "as recorded before there was a choice"
    )
    assert each.fingerprint()["text"]["bos"] == "each_window"
    bos = tokenizer.bos_token_id
    stream = usual.text.token_ids
    assert stream[0] == bos and each.text.token_ids.tolist() == stream[1:].tolist(), "the stream itself has none"
    scores = evaluate(model, each, label="x", progress=QUIET)["perplexity"]
    assert list(scores) == ["ppl_jsonl_16_bos"]
    windows = [torch.cat([torch.tensor([bos]), chunk]) for chunk in stream[1:].split(15) if len(chunk) == 15]
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss for window in windows]
    assert scores["ppl_jsonl_16_bos"]["mean_nll"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert scores["ppl_jsonl_16_bos"]["num_predicted_tokens"] == 15 * len(windows)


def test_a_family_s_habit_is_found_in_a_compressed_model_too(spec, tokenizer, model):
    spec.zeroshot, spec.perplexity.windows = None, [16]
    for model_type in ("gemma3_text", "modegpt_gemma", "sliced_gemma2"):
        config = copy.deepcopy(model.config)
        config.model_type = model_type
        text = prepare_evaluation(spec, tokenizer=tokenizer, model_config=config).text
        assert text.bos == tokenizer.bos_token_id


def test_dense_key_holds_all_a_score_depends_on(spec, tokenizer, model):
    prepared = prepare(spec, tokenizer, model)
    given = {"weights_sha256": "w", "tokenizer_sha256": "t", "dtype": "float32", "device": "cpu"}
    key = dense_key(prepared, **given)
    assert set(key["packages"]) == {"lm_eval", "torch", "transformers"}
    for name in given:
        assert dense_key(prepared, **given | {name: "other"}) != key


def test_retention():
    def scores(accuracy: float, perplexity: float) -> dict:
        return {
            "perplexity": {"ppl_tiny_256": {"value": perplexity}},
            "zeroshot": {
                "a": {"metric": "acc_norm", "value": accuracy},
                "w": {"metric": "word_perplexity", "value": 3.0},
                "mean": {"value": accuracy},
            },
        }

    kept = retention(scores(0.8, 4.0), scores(0.6, 6.0))
    assert kept == {
        "zeroshot": {"a": pytest.approx(0.75), "mean": pytest.approx(0.75)},
        "perplexity_increase": {"ppl_tiny_256": 1.5},
    }
    assert retention(scores(0.0, 1.0), scores(0.1, 1.0))["zeroshot"]["a"] is None
    with pytest.raises(AssertionError):
        retention(scores(0.8, 4.0), {"perplexity": {}, "zeroshot": {}})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerplexitySpec(windows=[]), "windows=.* should be auto or a list"),
        (lambda: PerplexitySpec(windows="2048"), "windows=2048 should be auto or a list"),
        (lambda: PerplexitySpec(windows=[1]), "at least 2 tokens"),
        (lambda: PerplexitySpec(batch_tokens=0), "batch_tokens=0 should be at least 1"),
        (lambda: ZeroShotSpec(tasks=[]), "should be tiny, paper or a list"),
        (lambda: ZeroShotSpec(tasks=[3]), "should be tiny, paper or a list"),
        (lambda: ZeroShotSpec(batch_size=0), "batch_size=0 should be at least 1"),
        (lambda: ZeroShotSpec(limit=0), "limit=0 should be at least 1"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_configurations_are_specs(repository):
    expected = {
        "tiny": ("tiny", ["tiny"]),
        "wikitext2": ("wikitext2", None),
        "paper": ("wikitext2", ["paper"]),
        "jsonl": ("jsonl", None),
        "text": ("text", None),
        "none": (None, None),
    }
    folder = repository / "conf" / "evaluation"
    assert {path.stem for path in folder.glob("*.yaml")} == set(expected)
    with initialize_config_dir(str(folder.parent), version_base="1.3"):
        for name, (source, tasks) in expected.items():
            config = OmegaConf.to_container(compose(f"evaluation/{name}"))["evaluation"]
            spec = EvaluationSpec(
                perplexity=PerplexitySpec(**config["perplexity"]), zeroshot=ZeroShotSpec(**config["zeroshot"])
            )
            assert (spec.perplexity.source, spec.zeroshot.tasks) == (source, tasks)


def test_auto_windows_of_a_real_context(spec, tokenizer, model):
    spec.perplexity.windows = "auto"
    assert prepare(spec, tokenizer, model).text.windows == [64]
    assert torch.equal(prepare(spec, tokenizer, model).text.token_ids[:1], torch.tensor([0]))


def test_what_is_asked_reaches_the_harness(tokenizer, model, monkeypatch):
    """Each option away from its default, and the same store of encodings for every model."""
    asked = []

    def noted(*args, **options):
        asked.append((args, options))
        return {"mean": {}}

    monkeypatch.setattr("modegpt.evaluation.evaluate.zeroshot", noted)
    spec = ZeroShotSpec(tasks=["a"], batch_size=3, limit=7, apply_chat_template=True)
    prepared = PreparedEvaluation(tokenizer=tokenizer, context=77, text=None, zeroshot=spec, tasks={"a": 1})
    found = evaluate(model, prepared, label="dense", progress=Progress(quiet=True))
    [(args, options)] = asked
    assert found == {"perplexity": {}, "zeroshot": {"mean": {}}} and args == (model, tokenizer, {"a": 1})
    wanted = {"batch_size": 3, "max_length": 77, "limit": 7, "apply_chat_template": True}
    assert options | wanted == options and options["encodings"] is prepared.encodings
    assert options["progress"] is not None and options["begun"] is not None


def test_what_is_asked_reaches_the_tasks(tokenizer, model, text_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "modegpt.evaluation.evaluate.load_tasks", lambda names, **options: asked.append((names, options)) or {}
    )
    zeroshot = ZeroShotSpec(tasks=["a"], data_path="folder", num_fewshot=3, run_code=True)
    text = PerplexitySpec(source="jsonl", path=text_path, windows=[16])
    prepare(EvaluationSpec(perplexity=text, zeroshot=zeroshot), tokenizer, model)
    [(names, options)] = asked
    assert names == ["a"] and options.pop("documents").source == "jsonl"
    assert options == {"data_path": "folder", "num_fewshot": 3, "run_code": True}


def test_what_was_scored_before_is_said_to_be(spec, tokenizer, model, capsys):
    spec.zeroshot = None
    prepared, begun = prepare(spec, tokenizer, model), Begun()
    for before in (0, 2):
        evaluate(model, prepared, label="dense", progress=Progress(), begun=begun)
        said = "".join(capsys.readouterr())
        assert said.count("dense: ppl_jsonl_") == 2 and said.count("(scored before)") == before
