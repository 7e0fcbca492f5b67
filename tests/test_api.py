"""The public Python API: what it returns, saves and loads again, and what it refuses."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import modegpt
from modegpt.config import CalibrationConfig, DecompositionConfig, ModelConfig, OutputConfig, RunConfig, TrackingConfig
from modegpt.errors import UserError
from modegpt.evaluation.spec import EvaluationSpec, PerplexitySpec
from modegpt.models import block_linear_parameters
from modegpt.records.store import load_record
from modegpt.run import run
from tests.models.test_fresh_process import output, start

TEXTS = ["The old baker walked to the market and bought two apples . " * 30] * 12
SMALL: dict[str, Any] = {"num_samples": 4, "sequence_length": 128, "quiet": True}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return modegpt.load_tokenizer("embedded:tiny-llama")


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return modegpt.load("embedded:tiny-llama")


@pytest.fixture(scope="module")
def smaller(dense: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
    return modegpt.compress(dense, tokenizer, TEXTS, **SMALL)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_the_compressed_model_has_its_report(dense: PreTrainedModel, tokenizer: Any) -> None:
    before, was = {name: value.clone() for name, value in dense.state_dict().items()}, dense.training
    dense.train()
    model = modegpt.compress(dense, tokenizer, TEXTS, sparsity=0.4, **SMALL)
    assert dense.training and not model.training
    dense.train(was)
    assert isinstance(model, PreTrainedModel)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items()), "the model is untouched"
    report = json.loads(json.dumps(model.modegpt_report))
    removed = 1 - block_linear_parameters(model) / block_linear_parameters(dense)
    assert report["compression"]["achieved_sparsity"] == pytest.approx(removed) == pytest.approx(0.4, abs=1e-3)
    assert len(report["compression"]["layers"]) == dense.config.num_hidden_layers
    assert report["compression"]["target_sparsity"] == 0.4 and report["compression"]["method"] == "modegpt"
    assert report["calibration"]["source"] == "texts" and report["calibration"]["num_tokens"] == 512
    assert report["model"]["num_parameters"] == dense.num_parameters()
    assert report["model"]["name"] == "tiny-llama" and report["model"]["path"] is None, "no path of this machine"
    assert [layer["ranks"]["mlp"] for layer in report["compression"]["layers"]] == model.config.intermediate_sizes


def test_it_is_the_model_that_the_main_job_makes(
    smaller: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEGPT_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": each}) for each in TEXTS), encoding="utf-8")
    config = RunConfig(
        quiet=True,
        model=ModelConfig(name="tiny-llama", path="embedded:tiny-llama"),
        method={"name": "modegpt"},
        decomposition=DecompositionConfig({"name": "nystrom"}, {"name": "cr"}, {"name": "svd"}),
        allocation={"name": "entropic"},
        calibration=CalibrationConfig(source="jsonl", path=str(text), num_samples=4, sequence_length=128),
        evaluation=EvaluationSpec(PerplexitySpec(source=None), None),
        output=OutputConfig(root=str(tmp_path), save_model=str(tmp_path / "model"), pictures=False),
        tracking=TrackingConfig(mode="disabled"),
    )
    record = load_record(run(config, command="modegpt"))
    saved = modegpt.load(tmp_path / "model").state_dict()
    assert saved.keys() == smaller.state_dict().keys()
    assert all(torch.equal(value, saved[name]) for name, value in smaller.state_dict().items())
    report = smaller.modegpt_report
    assert record["compression"] == json.loads(json.dumps(report["compression"]))
    assert record["calibration"]["tokens_sha256"] == report["calibration"]["tokens_sha256"]


SCRIPT = """
import sys
sys.modules["modegpt"] = None  # any import of the package fails
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
saved = torch.load("logits.pt")
with torch.no_grad():
    assert torch.equal(model(torch.arange(3, 40)[None]).logits, saved)
tokenizer = AutoTokenizer.from_pretrained("model")
out = model.generate(**tokenizer("The old", return_tensors="pt"), max_new_tokens=4, do_sample=False)
print("equal", out.shape[1])
"""


def test_saved_by_transformers_it_loads_in_a_fresh_process(
    smaller: PreTrainedModel, tokenizer: Any, tmp_path: Path
) -> None:
    smaller.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    torch.save(logits(smaller), tmp_path / "logits.pt")
    (tmp_path / "load.py").write_text(SCRIPT)
    fresh = start(["load.py"], tmp_path)

    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"README.md", "modegpt_report.json", "config.json", "model.safetensors", "modeling_modegpt.py"} <= names
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers") and "## Sizes per layer" in card and "30.0" in card
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["intermediate_sizes"] == smaller.config.intermediate_sizes and "auto_map" in config

    again = modegpt.load(tmp_path / "model")
    assert again.modegpt_report == json.loads(json.dumps(smaller.modegpt_report))
    assert torch.equal(logits(again), logits(smaller))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text(encoding="utf-8") == card
    assert "equal" in output(fresh)


def test_scores_in_the_report_go_into_the_card(smaller: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    scores = modegpt.evaluate(smaller, tokenizer, TEXTS[:4], windows=[128], quiet=True)
    report = dict(vars(smaller)["modegpt_report"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smaller, "modegpt_report", report | {"metrics": {"compressed": scores}})
        smaller.save_pretrained(tmp_path)
    value, card = scores["perplexity"]["ppl_texts_128"]["value"], (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"| ppl_texts_128 |  | {value:.4f} |" in card and "base_model" not in card


def test_the_card_names_the_model_on_the_hub(dense: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(dense)
    model.config._name_or_path = "someone/tiny"
    smaller = modegpt.compress(model, tokenizer, TEXTS, method="random", **SMALL)
    smaller.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "\nbase_model: someone/tiny\n" in card and "| dense model | tiny |" in card


def test_a_pushed_model_has_the_same_files(
    smaller: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: dict[str, bytes] = {}

    class Hub:
        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, *, operations: list[Any], **kwargs: Any) -> None:
            pushed.update({each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations})

    generic = SimpleNamespace(save=lambda path: Path(path).write_text("a generated card"))
    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: generic)
    smaller.save_pretrained(tmp_path)
    smaller.push_to_hub("someone/smaller")
    for name in ("README.md", "modegpt_report.json", "config.json", "model.safetensors", "modeling_modegpt.py"):
        assert pushed[name] == (tmp_path / name).read_bytes(), name


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("modegpt", {"mlp": "svd", "query_key": "none", "allocation": {"name": "entropic", "epsilon": 0.2}}),
        ("modegpt", {"skip_layers": (0,), "module_sparsity": {"mlp": 0.4}, "rank_multiple": {"mlp": 8}}),
        ("modegpt_plus", {"temperature": False, "allocation": "uniform"}),
        ("asvd", {"alpha": 0.3}),
        ("slicegpt", {}),
        ("random", {"budget": "nearest"}),
    ],
)
def test_options_are_plain_keywords(
    method: str, options: dict[str, Any], dense: PreTrainedModel, tokenizer: Any, tmp_path: Path
) -> None:
    model = modegpt.compress(dense, tokenizer, TEXTS, sparsity=0.25, method=method, **options, **SMALL)
    compression = model.modegpt_report["compression"]
    assert compression["method"] == method and 0.1 < compression["achieved_sparsity"] < 0.35
    if "skip_layers" in options:
        assert compression["layers"][0]["sparsity"] == 0 and not any(
            size % 8 for size in model.config.intermediate_sizes
        )
    if options.get("query_key") == "none":
        assert set(model.config.qk_head_dims) == {model.config.dense_head_dim}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model)) and (tmp_path / "README.md").exists()


def test_a_path_stands_for_a_model_and_a_name_for_a_text() -> None:
    model = modegpt.compress("embedded:tiny-opt", None, "tiny", method="magnitude", **SMALL)
    assert model.modegpt_report["calibration"]["source"] == "tiny"
    scores = modegpt.evaluate(
        model,
        modegpt.load_tokenizer("embedded:tiny-opt"),
        "tiny",
        tasks=["tiny_pronoun"],
        windows=[128],
        limit=4,
        quiet=True,
    )
    assert scores["perplexity"]["ppl_tiny_128"]["value"] > 1
    assert 0 <= scores["zeroshot"]["tiny_pronoun"]["value"] <= 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "slicegtp"}, "^method=slicegtp is not known; .*did you mean slicegpt"),
    "dense": ({"method": "dense"}, "compresses nothing"),
    "option": ({"mpl": "svd"}, "^mpl is not known; .*did you mean mlp"),
    "keyword": ({"num_sample": 3}, "^num_sample is not known; .*did you mean num_samples"),
    "decomposition": ({"mlp": "svg"}, "^mlp=svg is not known; .*did you mean svd"),
    "option of a decomposition": ({"mlp": {"name": "nystrom", "rigde": 1}}, "^mlp.rigde is not known; .*mean ridge"),
    "option of a method": ({"method": "asvd", "alhpa": 1.0}, "^alhpa is not known; .*did you mean alpha"),
    "option without effect": ({"method": "svd", "skip_layers": [0]}, "^skip_layers has no effect with method=svd"),
    "module": ({"module_sparsity": {"mpl": 0.1}}, "^module_sparsity.mpl is not known; .*did you mean mlp"),
    "sparsity": ({"sparsity": 1.5}, r"^sparsity=1.5 is outside \[0, 1\)"),
    "too little text": ({"num_samples": 10**6}, "lower num_samples to"),
    "samples": ({"num_samples": 0}, "^num_samples=0 is too small"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_refused_in_one_line(case: str, dense: PreTrainedModel, tokenizer: Any) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as refused:
        modegpt.compress(dense, tokenizer, TEXTS, **SMALL | changes)
    assert isinstance(refused.value, UserError) and "\n" not in str(refused.value)


def test_bad_models_and_texts_are_refused(smaller: PreTrainedModel, dense: PreTrainedModel, tokenizer: Any) -> None:
    for model, tokens, texts, message in (
        (smaller, tokenizer, TEXTS, "compressed already"),
        (torch.nn.Linear(2, 2), tokenizer, TEXTS, "not a Linear"),
        (dense, None, TEXTS, "tokenizer is missing"),
        (dense, tokenizer, "a lone string", "should be a list of strings, or one of"),
        (dense, tokenizer, [{"text": "row"}], "give the column"),
        (dense, tokenizer, [" "], "no text"),
        ("no/such/model/anywhere", None, TEXTS, "no model directory"),
    ):
        with pytest.raises(UserError, match=message):
            modegpt.compress(model, tokens, texts, **SMALL)
    with pytest.raises(UserError, match="nothing to score"):
        modegpt.evaluate(dense, tokenizer)
    with pytest.raises(UserError, match=r"^windows="):
        modegpt.evaluate(dense, tokenizer, TEXTS, windows=[1])


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, modegpt; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert {"compress", "evaluate", "load", "load_tokenizer"} <= set(dir(modegpt))
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = modegpt.compres
