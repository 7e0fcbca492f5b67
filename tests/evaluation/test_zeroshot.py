"""Zero-shot scores equal the harness's own wrapper's, item by item, and nothing happens silently."""

import copy
import logging
import math
import random
import types

import datasets
import numpy as np
import pytest
import torch
from tqdm import tqdm

from modegpt.errors import UserError
from modegpt.evaluation import tasks as task_module
from modegpt.evaluation.begun import Begun
from modegpt.evaluation.isolation import isolated_harness
from modegpt.evaluation.items import unpack
from modegpt.evaluation.tasks import PAPER_TASKS, load_tasks, task_fingerprint
from modegpt.evaluation.zeroshot import mean_score, zeroshot
from modegpt.progress import Progress
from tests.evaluation.task_rows import ROWS

QUIET = Progress(quiet=True)


def score(model, tokenizer, tasks, **changes) -> dict:
    options = {"batch_size": 4, "max_length": 512, "limit": None, "encodings": {}, "progress": QUIET} | changes
    return zeroshot(model, copy.deepcopy(tokenizer), tasks, **options)


@pytest.fixture
def wide_model(model):
    """The model with a context that holds every request."""
    wide = copy.deepcopy(model)
    wide.config.max_position_embeddings = 512
    return wide


def requests_of(tasks) -> list:
    with isolated_harness():
        for task in tasks.values():
            task.build_all_requests()
    return [instance for task in tasks.values() for instance in task.instances]


def our_wrapper(model, tokenizer, *, max_length: int, batch_size: int):
    with isolated_harness():
        from modegpt.evaluation.harness_model import HarnessModel

        own_tokenizer = copy.deepcopy(tokenizer)
        bar = tqdm(disable=True)
        return HarnessModel(
            model,
            own_tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            encodings={},
            bar=bar,
            begun=Begun(),
        )


def both_wrappers(model, tokenizer, requests, *, max_length: int, batch_size: int = 3):
    """(log-likelihood, greedy) of each request, by the harness's wrapper and by ours; and ours."""
    ours = our_wrapper(model, tokenizer, max_length=max_length, batch_size=batch_size)
    with isolated_harness():
        from lm_eval.models.huggingface import HFLM

        stock = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=5, max_length=max_length)
        return stock.loglikelihood(requests, disable_tqdm=True), ours.loglikelihood(requests), ours


def assert_same(stock, ours) -> None:
    assert [greedy for _, greedy in stock] == [greedy for _, greedy in ours]
    values = [torch.tensor([value for value, _ in results]) for results in (ours, stock)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("max_length", [512, 48])
def test_likelihoods_equal_the_harness_wrapper(wide_model, tokenizer, task_folder, max_length):
    requests = requests_of(load_tasks(["paper", "openbookqa"], data_path=str(task_folder)))
    stock, ours, scorer = both_wrappers(wide_model, tokenizer, requests, max_length=max_length)
    assert_same(stock, ours)
    longer = sum(
        len("".join(request.args)) + 1 > max_length + 1 for request in requests
    )  # one token a character, and BOS
    assert scorer.num_truncated.total() == longer and (longer > 0) == (max_length == 48)


def test_odd_requests_equal_the_harness_wrapper(wide_model, tokenizer):
    pairs = [
        ("", " from nothing"),
        ("a ", "b"),
        ("a", " b"),
        ("a", " c"),
        ("", "<s>x"),
        ("a", " b"),
        ("line\n", "next"),
    ]
    pairs += [("<s>given", " bos"), ("<s>given", " two")]
    requests = [types.SimpleNamespace(args=pair, task_name="odd") for pair in pairs]
    stock, ours, scorer = both_wrappers(wide_model, tokenizer, requests, max_length=512)
    assert_same(stock, ours)
    letters = {letter: tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in " ab"}
    assert scorer.encodings["a ", "b"] == ([0, letters["a"]], [letters[" "], letters["b"]])


def test_real_tokenizer_equals_the_harness_wrapper(shared_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = shared_dir / "models" / "stories260K"
    tasks = load_tasks(["piqa", "winogrande", "hellaswag"], data_path=str(shared_dir / "data" / "zeroshot"))
    requests = requests_of(tasks)[::150]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    stock, ours, _ = both_wrappers(model, tokenizer, requests, max_length=512)
    assert len(requests) > 50
    assert_same(stock, ours)


def test_continuation_longer_than_the_context_keeps_its_end(model, tokenizer):
    request = types.SimpleNamespace(args=("ab", " " + "cd" * 20), task_name="long")
    ours = our_wrapper(model, tokenizer, max_length=16, batch_size=1)
    ((value, _),) = ours.loglikelihood([request])
    ids = torch.tensor(tokenizer("cd" * 20)["input_ids"][-17:])
    with torch.inference_mode():
        expected = model(ids[None, :-1]).logits[0].log_softmax(-1).gather(1, ids[1:, None]).sum()
    assert value == pytest.approx(expected.item(), rel=1e-5)
    assert ours.num_truncated == {"long": 1}


def test_scores_by_hand(wide_model, tokenizer, task_folder):
    """acc is the argmax of the log-likelihoods; acc_norm of those per character; errors are those of a mean."""
    tasks = load_tasks(["arc_easy", "winogrande"], data_path=str(task_folder))
    requests = requests_of(tasks)
    _, likelihoods, _ = both_wrappers(wide_model, tokenizer, requests, max_length=512)
    scores = score(wide_model, tokenizer, tasks)
    for name, metrics in (("arc_easy", ("acc", "acc_norm")), ("winogrande", ("acc",))):
        hits: dict[str, list[int]] = {metric: [] for metric in metrics}
        for index, row in enumerate(ROWS[name]):
            scored = zip(requests, likelihoods, strict=True)
            values = [value for request, (value, _) in scored if (request.task_name, request.doc_id) == (name, index)]
            lengths = [len(choice) for choice in row.get("choices", "ab")]
            hits["acc"].append(max(range(len(values)), key=values.__getitem__) == row["gold"])
            if "acc_norm" in metrics:
                hits["acc_norm"].append(max(range(len(values)), key=lambda i: values[i] / lengths[i]) == row["gold"])
        for metric in metrics:
            n, mean = len(hits[metric]), sum(hits[metric]) / len(hits[metric])
            assert scores[name][metric] == pytest.approx(mean)
            assert scores[name][f"{metric}_stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / (n - 1)))
        assert scores[name]["metric"] == metrics[-1] and scores[name]["value"] == scores[name][metrics[-1]]
        assert unpack(scores[name]).tolist() == hits[metrics[-1]]
        assert scores[name]["num_items"] == len(ROWS[name]) and scores[name]["num_truncated"] == 0
    errors = [scores[name]["stderr"] for name in tasks]
    assert scores["mean"] == {
        "value": pytest.approx((scores["arc_easy"]["value"] + scores["winogrande"]["value"]) / 2),
        "stderr": pytest.approx(math.hypot(*errors) / 2),
        "num_tasks": 2,
        "limit": None,
    }


def test_batch_size_and_kept_tokens_do_not_matter(wide_model, tokenizer, task_folder):
    tasks = load_tasks(["paper"], data_path=str(task_folder))
    encodings: dict = {}
    reference = score(wide_model, tokenizer, tasks, batch_size=1, encodings=encodings)
    assert len(encodings) == len({request.args for request in requests_of(tasks)})
    for batch_size in (2, 7, 64):
        assert score(wide_model, tokenizer, tasks, batch_size=batch_size, encodings=encodings) == reference


def test_equal_inputs_share_a_forward_pass(wide_model, tokenizer):
    pairs = [("The animal is a", f" {letter}") for letter in "abcdefgh"]
    rows = []
    handle = wide_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    ours = our_wrapper(wide_model, tokenizer, max_length=512, batch_size=4)
    values = ours.loglikelihood([types.SimpleNamespace(args=pair, task_name="t") for pair in pairs])
    handle.remove()
    assert rows == [1] and len({value for value, _ in values}) == 8


def test_limit_is_marked_and_one_item_has_no_error(wide_model, tokenizer, task_folder):
    scores = score(wide_model, tokenizer, load_tasks(["arc_easy"], data_path=str(task_folder)), limit=1)
    assert scores["arc_easy"]["num_items"] == 1 and scores["arc_easy"]["stderr"] is None
    assert scores["mean"]["limit"] == 1 and scores["mean"]["stderr"] is None


@pytest.mark.parametrize(("max_length", "cut"), [(12, 0), (11, 1)])
def test_a_request_fits_when_its_last_token_is_only_predicted(model, tokenizer, max_length, cut):
    scorer = our_wrapper(model, tokenizer, max_length=max_length, batch_size=1)
    scorer.loglikelihood([types.SimpleNamespace(args=("a" * 10, " b"), task_name="t")])  # 13 tokens with BOS
    assert scorer.num_truncated["t"] == cut


def test_truncation_is_counted_and_said(model, tokenizer, task_folder, monkeypatch):
    said = []
    monkeypatch.setattr(Progress, "say", lambda self, line: said.append(line))
    scores = score(model, tokenizer, load_tasks(["piqa"], data_path=str(task_folder)), max_length=24)
    assert scores["piqa"]["num_truncated"] == 4
    assert said == ["piqa: 4 requests were longer than the context of 24 tokens and lost their beginning"]


def test_nan_is_an_error(wide_model, tokenizer, task_folder):
    with torch.no_grad():
        wide_model.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite while scoring zero-shot tasks"):
        score(wide_model, tokenizer, load_tasks(["arc_easy"], data_path=str(task_folder)))


def test_leaves_no_trace(wide_model, tokenizer, task_folder, capfd):
    from lm_eval.utils import env

    def states() -> tuple:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()

    before = states()
    level = logging.getLogger("lm_eval").level
    score(wide_model, tokenizer, load_tasks(["paper"], data_path=str(task_folder)))
    assert states() == before
    assert logging.getLogger("lm_eval").level == level and "from_string" not in vars(env)
    assert capfd.readouterr() == ("", "")


def test_our_progress_stays_visible(wide_model, tokenizer, task_folder, capfd, monkeypatch):
    monkeypatch.setattr("modegpt.progress.LOG_SECONDS", 0.0)
    score(wide_model, tokenizer, load_tasks(["arc_easy"], data_path=str(task_folder)), progress=Progress())
    assert "zero-shot tasks" in capfd.readouterr().err


def test_tiny_tasks_are_read_by_their_kind(wide_model, tokenizer, tmp_path, monkeypatch):
    configs = {}
    for name in ("tiny_story", "tiny_pronoun"):
        (tmp_path / f"{name}.jsonl").write_text('{"context": "Ann saw", "choices": ["Eve", "Tom"], "gold": 1}\n' * 3)
        configs[name] = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "context",
            "doc_to_target": "gold",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    monkeypatch.setattr("modegpt.data.embedded.task_configs", lambda: configs)
    scores = score(wide_model, tokenizer, load_tasks(["tiny"], data_path=None))
    assert {name: scores[name]["metric"] for name in configs} == {"tiny_story": "acc_norm", "tiny_pronoun": "acc"}


def test_paper_tasks_from_the_hub(task_folder, monkeypatch):
    """The harness asks the hub for what it needs; what comes back in the tasks' own columns scores the same strings."""
    local = load_tasks(["paper"], data_path=str(task_folder))
    asked = {
        ("baber/piqa", None): "piqa",
        ("Rowan/hellaswag", None): "hellaswag",
        ("allenai/winogrande", "winogrande_xl"): "winogrande",
        ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
        ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
    }

    def load_dataset(path, name=None, **kwargs):
        task = asked[path, name]
        rows = {split: datasets.Dataset.from_list(list(rows)) for split, rows in local[task].dataset.items()}
        return datasets.DatasetDict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = load_tasks(["paper"], data_path=None)
    assert list(hub) == list(PAPER_TASKS)
    assert [request.args for request in requests_of(hub)] == [request.args for request in requests_of(local)]
    fingerprints = [
        {name: task_fingerprint(task, limit=None) for name, task in tasks.items()} for tasks in (hub, local)
    ]
    assert fingerprints[0] == fingerprints[1]


def test_unreachable_hub_says_how_to_pass_files():
    with pytest.raises(
        UserError, match=r"data of task piqa from the hub .* give local files: evaluation.zeroshot.data_path=FOLDER"
    ):
        load_tasks(["paper"], data_path=None)


def test_unknown_tasks_are_refused_with_close_names(monkeypatch):
    import lm_eval.tasks

    # the real one reads 14,683 files
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: types.SimpleNamespace(all_tasks=["boolq", "mmlu"]))
    with pytest.raises(UserError, match=r"unknown task 'bool_q' in evaluation.zeroshot.tasks; did you mean boolq"):
        load_tasks(["bool_q"], data_path=None)
    with pytest.raises(UserError, match=r"unknown task 'zzz' .* names"):
        load_tasks(["zzz"], data_path=None)


def test_fingerprint_follows_items_and_limit(task_folder):
    task = load_tasks(["openbookqa"], data_path=str(task_folder))["openbookqa"]
    assert task_fingerprint(task, limit=None) == task_fingerprint(task, limit=2) != task_fingerprint(task, limit=1)
    file = task_folder / "openbookqa_some.jsonl"
    file.write_text(file.read_text().replace("grass", "moss"))
    changed = load_tasks(["openbookqa"], data_path=str(task_folder))["openbookqa"]
    assert task_fingerprint(changed, limit=1) != task_fingerprint(task, limit=1)


def test_a_task_without_accuracy_is_not_averaged():
    scores = {
        "a": {"metric": "acc", "value": 0.5, "stderr": 0.1},
        "b": {"metric": "word_perplexity", "value": 30.0, "stderr": None},
    }
    assert mean_score(scores, limit=None) == {"value": 0.5, "stderr": pytest.approx(0.1), "num_tasks": 1, "limit": None}
    assert mean_score({"b": scores["b"]}, limit=None)["value"] is None


def test_standard_tasks_are_where_the_harness_keeps_them():
    for name in task_module.STANDARD_TASKS:
        assert task_module._standard_config(name)["task"] == name
