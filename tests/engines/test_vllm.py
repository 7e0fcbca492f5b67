"""vLLM runs an export with every size kept: the same tokens, the same log-probabilities, served and scored."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from modegpt.cli.export import export
from modegpt.models import dense_shape, family_of
from modegpt.models.checkpoints import load_model, load_tokenizer, save_checkpoint
from modegpt.models.deci import FAMILIES as DECI
from modegpt.models.export import stock_model
from tests.engines.forms import FORMS, VOCABULARY, with_heads_of_32
from tests.engines.greedy import PROMPTS, assert_same, greedy
from tests.models.family_table import CONFIGS, dense_model, sliced_model
from tests.models.test_quantised import given_back

pytestmark = [pytest.mark.engines, pytest.mark.slow]

FORMS_OF = {
    "vllm": [name for name in FORMS if name != "opt-post-norm-projected"],
    "deci": [
        name
        for name in FORMS
        if name not in CONFIGS
        or (family_of(CONFIGS[name]).model_type in DECI and "window" not in name.replace("no-window", ""))
    ],
    "stock": ["llama", "qwen2", "opt", "shared heads"],
}
"""With every size kept: vLLM gives the head as many inputs as the hidden state has, and that of the one left out has
fewer. As DeciLM: what that class computes."""
CASES = [(engine, name) for engine, names in FORMS_OF.items() for name in names]


def asked(model: PreTrainedModel, folder: Path, *, engine: str = "vllm", **options) -> tuple[dict[str, Any], list]:
    """What vLLM is asked of an export of ``model`` in ``folder``, and what our logits say to it."""
    save_checkpoint(model, load_tokenizer("embedded:tiny-llama"), folder / "ours", {})
    export(str(folder / "ours"), folder / "theirs", engine=engine, pages="cpu", force=True)
    job = {"path": str(folder / "theirs"), "prompts": PROMPTS, "num_new": 8, "options": options}
    return job, [greedy(model, prompt, 8) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def answers(ask: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Any, list]]:
    """By export and form: what vLLM said and what our logits say. One process for all, since each start takes long."""
    root, jobs, expected = tmp_path_factory.mktemp("forms"), [], []
    for engine, name in CASES:
        make, arguments = FORMS[name]
        model = make(**arguments, **({} if engine == "vllm" else with_heads_of_32(name)))
        job, wanted = asked(model, root / engine / name.replace(" ", "-"), engine=engine)
        jobs.append(job)
        expected.append(wanted)
    return dict(zip(CASES, zip(ask("vllm_greedy.py", jobs), expected, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_same_tokens_and_probabilities(answers: dict, case: tuple[str, str]) -> None:
    assert_same(*answers[case])


@pytest.mark.parametrize("name", ["low rank", "empty layer"])
def test_compiled(ask: Callable, tmp_path: Path, name: str) -> None:
    make, arguments = FORMS[name]
    job, wanted = asked(make(**arguments), tmp_path, enforce_eager=False)
    assert_same(ask("vllm_greedy.py", [job])[0], wanted)


def test_two_processes_share_the_layers(ask: Callable, tmp_path: Path) -> None:
    """Those of the cut model divide by two."""
    job, wanted = asked(sliced_model(dense_model("llama", **VOCABULARY))[0], tmp_path, tensor_parallel_size=2)
    assert_same(ask("vllm_greedy.py", [job])[0], wanted)


def quantised_job(root: Path, kind: str) -> tuple[dict[str, Any], list]:
    """The embedded model with narrower MLPs in its own class; what vLLM is asked, and what the rounded weights say."""
    tokenizer = load_tokenizer("embedded:tiny-llama")
    model = load_model("embedded:tiny-llama", device="cpu")
    model = sliced_model(model, dataclasses.replace(dense_shape(model.config), intermediate_size=288))[0]
    save_checkpoint(model, tokenizer, root / "ours", {})
    export(str(root / "ours"), root / "theirs", quantization=kind)
    stored, stock = load_file(root / "theirs" / "model.safetensors"), stock_model(model)[0]
    rounded = {
        name: given_back(stored, name) if f"{name}_scale" in stored else tensor
        for name, tensor in stock.state_dict().items()
    }
    stock.load_state_dict(rounded)
    prompts = [tokenizer(text).input_ids for text in ("Once upon a time, there was a little girl named", "The cat sat")]
    return {"path": str(root / "theirs"), "prompts": prompts, "num_new": 1}, [greedy(stock, ids, 1) for ids in prompts]


def test_quantised_weights_are_the_rounded_ones(ask: Callable, tmp_path: Path) -> None:
    """At 8 bits states are rounded too; the kernel of 4 bits is for 16-bit states alone."""
    (eight, said_by_eight), (four, said_by_four) = (quantised_job(tmp_path / kind, kind) for kind in ("int8", "int4"))
    four["options"] = {"dtype": "bfloat16"}
    found = ask("vllm_greedy.py", [eight, four])
    assert_same(found[0], said_by_eight, tolerance=0.1)
    assert_same(found[1], said_by_four, tolerance=0.1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with random columns gone, for vLLM."""
    root = tmp_path_factory.mktemp("served")
    model = sliced_model(load_model("embedded:tiny-llama", device="cpu"))[0]
    save_checkpoint(model, load_tokenizer("embedded:tiny-llama"), root / "ours", {})
    export(str(root / "ours"), root / "vllm", engine="vllm", pages="cpu")
    return root / "vllm"


@pytest.fixture(scope="module")
def address(engines: Path, environment: dict[str, str], exported: Path, tmp_path_factory) -> Iterator[str]:
    """Where ``vllm serve`` answers; skips, with the end of what it said, where it does not start."""
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--trust-remote-code", "--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]
    command = [engines / "vllm", "serve", exported, *options, "--port", str(port)]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder) as server,
    ):
        try:
            deadline = time.monotonic() + 400
            while not _answers(f"http://localhost:{port}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.skip(f"vllm serve does not start here: {(folder / 'log').read_text()[-2000:]}")
                time.sleep(1)
            yield f"http://localhost:{port}/v1/completions"
        finally:
            server.terminate()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def test_the_server_answers(address: str, exported: Path) -> None:
    model, tokenizer = load_model(str(exported), device="cpu"), load_tokenizer(str(exported))
    ids = tokenizer("The cat", return_tensors="pt").input_ids
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    body = {"model": str(exported), "prompt": "The cat", "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=100) as reply:
        text = json.load(reply)["choices"][0]["text"]
    assert text == tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)


TASK = """task: cats
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{target}}}}"
metric_list: [{{metric: acc}}]
"""
QUESTIONS = [
    {"text": "The cat", "choices": [" eats", " sleeps", " runs"], "target": 0},
    {"text": "One day a girl", "choices": [" eats bread", " sees a dog"], "target": 1},
    {"text": "She", "choices": [" is", " has a", " went home"], "target": 2},
]


def test_lm_eval_scores_the_served_model(
    address: str, exported: Path, engines: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """The same log-likelihoods through the server as through Transformers, in the harness's own samples."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    (tmp_path / "cats.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    common = [
        "--include_path",
        str(tmp_path),
        "--tasks",
        "cats",
        "--log_samples",
        "--batch_size",
        "1",
        "--device",
        "cpu",
    ]
    served = f"model={exported},base_url={address},tokenizer={exported},trust_remote_code=True,max_length=64"
    local = f"pretrained={exported},trust_remote_code=True,dtype=float32,max_length=64,add_bos_token=False"
    runs: dict[str, tuple[list[Any], Mapping[str, str]]] = {
        "served": ([engines / "lm_eval", "run", "--model", "local-completions", "--model_args", served], environment),
        "local": ([sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", local], os.environ),
    }
    found = {}
    for name, (command, variables) in runs.items():
        output = tmp_path / name
        done = subprocess.run(
            [*command, *common, "--output_path", str(output)],
            env={**variables, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        (samples,) = output.rglob("samples_cats*.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        lines.sort(key=lambda line: line["doc_id"])
        found[name] = [float(response[0]) for line in lines for response in line["filtered_resps"]]
    assert len(found["local"]) == 8 and found["served"] == pytest.approx(found["local"], abs=1e-3)
