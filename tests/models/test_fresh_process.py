"""A saved checkpoint in a process that did not make it, in the three ways people load one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from modegpt.models.checkpoints import load_model, save_checkpoint
from tests.models.family_table import tokens
from tests.models.saved import RECORD, compressed, tiny_tokenizer
from tests.processes import STUCK_SECONDS

CASES = [
    ("llama", "float32"),
    ("llama3-rope-tied", "bfloat16"),
    ("mistral-window", "float16"),
    ("qwen2-windows", "bfloat16"),
    ("qwen3", "float32"),
    ("opt", "float16"),
    ("opt-post-norm-projected", "float32"),
    ("gemma", "bfloat16"),
    ("phi3", "float32"),
]

SCRIPT = """
import json, sys
BLOCK = sys.argv[2] == "without"
if BLOCK:
    sys.modules["modegpt"] = None  # any import of the package fails
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
if not BLOCK:
    sys.path.insert(0, sys.argv[3])
    import modegpt.models
for case in json.load(open(sys.argv[1])):
    model = AutoModelForCausalLM.from_pretrained(case["path"], trust_remote_code=BLOCK or None)
    AutoTokenizer.from_pretrained(case["path"], trust_remote_code=BLOCK or None)
    module = type(model).__module__
    assert module.startswith("transformers_modules" if BLOCK else "modegpt.models"), module
    assert type(model.config) is type(model).config_class
    saved = torch.load(case["logits"])
    with torch.no_grad():
        logits = model(saved["ids"]).logits
    assert logits.dtype == saved["logits"].dtype and torch.equal(logits, saved["logits"]), case
    ids, mask = saved["ids"], torch.ones_like(saved["ids"])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(out, saved["generated"]), case
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == case["tied"]
print("all equal")
"""


def environment(tmp_path: Path) -> dict[str, str]:
    """No network, and no writing outside ``tmp_path``."""
    keep = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH") if key in os.environ}
    return keep | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def start(arguments: list[str], tmp_path: Path) -> subprocess.Popen[str]:
    """A Python process that cannot see this checkout by itself."""
    command = [sys.executable, "-I", *arguments]
    return subprocess.Popen(
        command, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def output(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=STUCK_SECONDS)
    assert process.returncode == 0, err[-3000:]
    return out


@torch.no_grad()
def answers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    ids = tokens()
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    return {"ids": ids, "logits": model(ids).logits, "generated": generated}


def test_logits_are_equal_with_the_package_and_without_it(tmp_path: Path, repository: Path) -> None:
    cases = []
    for name, dtype in CASES:
        model, path = compressed(name, dtype), tmp_path / f"{name}-{dtype}"
        save_checkpoint(model, tiny_tokenizer(), path, RECORD, max_shard_size="30KB" if name == "llama" else "5GB")
        torch.save(answers(model), tmp_path / f"{name}.pt")
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        cases.append({"path": str(path), "logits": str(tmp_path / f"{name}.pt"), "tied": tied})
        assert torch.equal(answers(load_model(str(path), "auto", "cpu"))["logits"], answers(model)["logits"])
    assert len(list((tmp_path / "llama-float32").glob("*.safetensors"))) > 1, "the sharded case is not sharded"
    assert {case["tied"] for case in cases} == {True, False}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "load.py").write_text(SCRIPT)
    ways = [start(["load.py", "cases.json", way, str(repository)], tmp_path) for way in ("with", "without")]
    assert all("all equal" in output(way) for way in ways)


@pytest.mark.slow
def test_lm_eval_scores_a_checkpoint_from_its_command_line(tmp_path: Path) -> None:
    save_checkpoint(compressed("llama"), tiny_tokenizer(), tmp_path / "model", RECORD)
    rows = [{"query": f"w{index} w5", "options": ["w7", "w8 w9"], "gold": index % 2} for index in range(3, 9)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "query",
        "doc_to_target": "gold",
        "doc_to_choice": "options",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.yaml").write_text(json.dumps(task))
    arguments = [
        "--model",
        "hf",
        "--model_args",
        "pretrained=model,trust_remote_code=True",
        "--tasks",
        "words",
        "--include_path",
        "tasks",
    ]
    block = "import sys; sys.modules['modegpt'] = None; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    out = output(start(["-c", block, "run", *arguments, "--device", "cpu", "--batch_size", "2"], tmp_path))
    assert "|words|" in out and "acc" in out
