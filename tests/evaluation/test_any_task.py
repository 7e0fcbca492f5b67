"""Any task of the harness on local files: examples in the prompt, chat templates, answers that are written, groups."""

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lm_eval.tasks
import pytest
import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from modegpt.cost.work import metered_forwards
from modegpt.errors import UserError
from modegpt.evaluation import items
from modegpt.evaluation.evaluate import prepare_evaluation, retention
from modegpt.evaluation.harness_model import HarnessModel
from modegpt.evaluation.isolation import isolated_harness
from modegpt.evaluation.spec import EvaluationSpec, PerplexitySpec, ZeroShotSpec
from modegpt.evaluation.tasks import TaskGroup, _settle, load_tasks, redraw_examples, task_fingerprint
from modegpt.evaluation.zeroshot import zeroshot
from modegpt.progress import Progress

HARNESS = Path(lm_eval.tasks.__file__).parent
STEM = sorted(
    path.stem
    for path in (HARNESS / "mmlu" / "default").glob("mmlu_*.yaml")
    if "mmlu_stem_tasks" in path.read_text(encoding="utf-8")
)
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def write(folder: Path, task: str, **splits: list[dict]) -> None:
    (folder / task).mkdir(parents=True)
    for split, rows in splits.items():
        (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def sums(numbers: range) -> list[dict]:
    return [{"question": f"{n} and 1?", "answer": f"One more. #### {n + 1}"} for n in numbers]


def questions(count: int, subject: str) -> list[dict]:
    return [
        {"question": f"{subject} {n}?", "choices": ["a", "b", "c", "d"], "answer": n % 4, "subject": subject}
        for n in range(count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """GSM8K, of four items and three examples, and the part of MMLU that is the group ``mmlu_stem``."""
    write(tmp_path, "gsm8k", test=sums(range(4)), train=sums(range(10, 13)))
    for number, task in enumerate(STEM):
        write(tmp_path, task, test=questions(1 + number % 3, task), dev=questions(5, f"dev {task}"))
    return tmp_path


@pytest.fixture
def wide_model(model):
    wide = copy.deepcopy(model)
    wide.config.max_position_embeddings = 512
    return wide


@pytest.fixture
def talking(tokenizer):
    """The tokenizer with a chat template."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return own


def score(model, tokenizer, tasks, **changes) -> dict:
    options: dict = {
        "batch_size": 4,
        "max_length": 512,
        "limit": None,
        "encodings": {},
        "progress": Progress(quiet=True),
    }
    return zeroshot(model, copy.deepcopy(tokenizer), tasks, **(options | changes))


def prompts(task) -> list[str]:
    with isolated_harness():
        redraw_examples(task)
        task.build_all_requests()
    return [instance.args[0] for instance in task.instances]


def answers(monkeypatch: pytest.MonkeyPatch, *written: str) -> None:
    """Let every model write these, whatever it is asked."""
    monkeypatch.setattr(HarnessModel, "generate_until", lambda self, requests, disable_tqdm=True: list(written))


def test_what_is_written_is_scored_item_by_item(folder, wide_model, tokenizer, monkeypatch) -> None:
    tasks = load_tasks(["gsm8k"], data_path=str(folder))
    answers(monkeypatch, "So #### 1", "So #### 7", "It is 3", "#### 4")
    found = score(wide_model, tokenizer, tasks)
    task = found["gsm8k"]
    assert task["metric"] == "exact_match" and task["value"] == 0.5 and task["num_items"] == 4
    assert items.unpack(task).tolist() == [1, 0, 0, 1], "strictly: after the four hashes"
    assert task["others"] == {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.75}
    assert found["mean"]["value"] == 0.5 and found["mean"]["num_tasks"] == 1

    answers(monkeypatch, "#### 1", "#### 7", "#### 7", "#### 7")
    worse = score(wide_model, tokenizer, tasks)
    kept = retention({"perplexity": {}, "zeroshot": found}, {"perplexity": {}, "zeroshot": worse})
    assert kept["zeroshot"] == {"gsm8k": 0.5, "mean": 0.5}
    # by hand: differences 1 - 0.5, 0, 0, 0 - 0.5 over 4 items, divided by the dense 0.5
    deviation = (0.5 / 3) ** 0.5
    assert items.retention_stderr([task], [worse["gsm8k"]]) == pytest.approx(deviation / 2 / 0.5)


def test_writing_is_the_harness_s_own(folder, wide_model, tokenizer) -> None:
    tasks = load_tasks(["gsm8k"], data_path=str(folder))
    work: list[float] = []
    with metered_forwards(wide_model, lambda *_, flops, **__: work.append(flops)):
        ours = score(wide_model, tokenizer, tasks, limit=2)["gsm8k"]
    assert len(work) > 2 and len(work) % 2 == 0, "a forward and a head for every token written"
    [task] = load_tasks(["gsm8k"], data_path=str(folder)).values()
    with isolated_harness():
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        stock = HFLM(pretrained=wide_model, tokenizer=copy.deepcopy(tokenizer), batch_size=4, max_length=512)
        raw = evaluate(lm=stock, task_dict={"tasks": {"gsm8k": task}}, limit=2, bootstrap_iters=100)
    assert ours["value"] == raw["results"]["gsm8k"]["exact_match,strict-match"]
    assert ours["num_items"] == 2 and ours["num_truncated"] == 0


def test_an_answer_as_long_as_the_context_is_refused(folder, model, tokenizer) -> None:
    with pytest.raises(UserError, match="'gsm8k' lets a model write 256 tokens, this one's context is 64"):
        score(model, tokenizer, load_tasks(["gsm8k"], data_path=str(folder)), max_length=64)


def test_examples_come_from_the_training_rows(folder, wide_model, tokenizer, monkeypatch) -> None:
    [plain] = load_tasks(["gsm8k"], data_path=str(folder)).values()
    assert [prompt.count("Question:") for prompt in prompts(plain)] == [1] * 4
    [(name, task)] = load_tasks(["gsm8k"], data_path=str(folder), num_fewshot=2).items()
    assert name == "gsm8k_2shot", "a figure of its own"
    for number, prompt in enumerate(prompts(task)):
        assert prompt.count("Question:") == 3 and prompt.endswith(f"{number} and 1?\nAnswer:")
        assert prompt.count("Question: 1") == 2 + (number == 1), "the examples are of 10, 11 and 12"
    assert prompts(task) == prompts(load_tasks(["gsm8k"], data_path=str(folder), num_fewshot=2)[name])
    seen: list[list[str]] = []

    def write_nothing(self, requests, disable_tqdm=True):
        seen.append([request.args[0] for request in requests])
        return [""] * len(requests)

    monkeypatch.setattr(HarnessModel, "generate_until", write_nothing)
    for _ in ("dense", "compressed"):
        score(wide_model, tokenizer, {name: task})
    assert seen[0] == seen[1] == prompts(task), "every model is asked the same"
    fingerprints = {task_fingerprint(each, limit=None) for each in (plain, task)}
    [other] = load_tasks(["gsm8k"], data_path=str(folder), num_fewshot=1).values()
    assert len(fingerprints | {task_fingerprint(other, limit=None)}) == 3


def test_a_task_has_its_own_number_of_examples(folder) -> None:
    with pytest.raises(UserError, match="num_fewshot=5: task 'gsm8k' has 3 rows to take examples from"):
        load_tasks(["gsm8k"], data_path=str(folder), num_fewshot=None)


def test_examples_are_never_of_the_rows_that_are_scored(task_folder) -> None:
    for name in ("arc_easy", "piqa"):
        with pytest.raises(UserError, match=f"'{name}' has 0 rows to take examples from, apart from those"):
            load_tasks([name], data_path=str(task_folder), num_fewshot=1)


def test_a_group_is_one_figure_over_all_its_items(folder, wide_model, tokenizer) -> None:
    tasks = load_tasks(["mmlu_stem"], data_path=str(folder), num_fewshot=5)
    assert list(tasks) == ["mmlu_stem_5shot"]
    group = tasks["mmlu_stem_5shot"]
    assert isinstance(group, TaskGroup) and sorted(group.tasks) == STEM
    assert all(prompt.count("Answer:") == 6 for prompt in prompts(group.tasks[STEM[0]]))
    zero = load_tasks(["mmlu_stem"], data_path=str(folder))
    found = score(wide_model, tokenizer, zero)
    assert found.keys() == {"mmlu_stem", "mean"} and found["mean"]["num_tasks"] == 1
    whole = found["mmlu_stem"]
    counts = {task: 1 + number % 3 for number, task in enumerate(STEM)}
    assert whole["num_items"] == sum(counts.values()) == len(items.unpack(whole))
    assert whole["value"] == pytest.approx(items.unpack(whole).mean())
    assert whole["value"] == pytest.approx(
        sum(whole["tasks"][task] * counts[task] for task in STEM) / whole["num_items"]
    )
    assert items.retention_stderr([whole], [whole]) == pytest.approx(
        items.least_stderr(whole["num_items"]) / whole["value"]
    )
    assert task_fingerprint(group, limit=None) != task_fingerprint(zero["mmlu_stem"], limit=None)


def test_a_group_that_weighs_its_tasks_alike_is_as_many_figures_as_tasks(folder, monkeypatch) -> None:
    load = TaskManager.load

    def alike(manager: TaskManager, names: list[str]) -> dict:
        loaded = load(manager, names)
        for metric in loaded["groups"]["mmlu_stem"].aggregate_metric_list:
            metric.weight_by_size = False
        return loaded

    monkeypatch.setattr(TaskManager, "load", alike)
    assert sorted(load_tasks(["mmlu_stem"], data_path=str(folder))) == STEM


def test_a_chat_template_makes_turns(folder, wide_model, talking, tokenizer, monkeypatch) -> None:
    def spec(**options) -> EvaluationSpec:
        chosen = ZeroShotSpec(tasks=["gsm8k"], data_path=str(folder), num_fewshot=1, **options)
        return EvaluationSpec(PerplexitySpec(), chosen)

    with pytest.raises(UserError, match="apply_chat_template=true, but the tokenizer has no chat template"):
        prepare_evaluation(spec(apply_chat_template=True), tokenizer=tokenizer, model_config=wide_model.config)
    chat = prepare_evaluation(spec(apply_chat_template=True), tokenizer=talking, model_config=wide_model.config)
    plain = prepare_evaluation(spec(), tokenizer=talking, model_config=wide_model.config)
    assert list(chat.tasks) == ["gsm8k_1shot_chat"] and list(plain.tasks) == ["gsm8k_1shot"]
    assert "chat_template" in chat.fingerprint() and "chat_template" not in plain.fingerprint()
    seen: list[str] = []

    def write_nothing(self, requests, disable_tqdm=True):
        seen.extend(request.args[0] for request in requests)
        return [""] * len(requests)

    monkeypatch.setattr(HarnessModel, "generate_until", write_nothing)
    found = score(wide_model, talking, chat.tasks, apply_chat_template=True)
    assert found["gsm8k_1shot_chat"]["value"] == 0
    for number, prompt in enumerate(seen):
        assert prompt.startswith("[user] Question: 1") and "[assistant] One more. #### 1" in prompt
        assert prompt.endswith(f"[user] Question: {number} and 1?\nAnswer:\n[assistant] ")


def test_code_runs_only_where_it_is_allowed() -> None:
    config = {"task": "shell", "output_type": "generate_until", "test_split": "test", "unsafe_code": True}
    config |= {"doc_to_text": "ask", "doc_to_target": "say", "metric_list": [{"metric": "exact_match"}]}
    rows = {"test": [{"ask": "rm -r", "say": "no"}]}
    with isolated_harness():
        import datasets

        data = datasets.DatasetDict({split: datasets.Dataset.from_list(each) for split, each in rows.items()})
        task = ConfigurableTask(config=config | {"custom_dataset": lambda **_: data})
    with pytest.raises(
        UserError, match=r"'shell' runs the code that the model writes, on this machine; .*run_code=true"
    ):
        _settle(task, 0, run_code=False)
    _settle(task, 0, run_code=True)


def test_what_a_task_needs_besides_its_data_is_named(folder) -> None:
    write(folder, "humaneval", test=[{"prompt": "def f():", "test": "", "entry_point": "f"}])
    with pytest.raises(UserError, match="cannot load task 'humaneval', which needs more than its data: "):
        load_tasks(["humaneval"], data_path=str(folder))


def test_functions_are_run_against_their_tests(folder, wide_model, tokenizer, monkeypatch) -> None:
    import evaluate

    rows = [
        {"task_id": f"{n}", "prompt": f"def f{n}():", "test": f"assert f{n}()", "entry_point": "f"} for n in range(3)
    ]
    write(folder, "humaneval", test=rows)

    def compute(references: list[str], predictions: list[list[str]], k: list[int]) -> tuple[dict, dict]:
        assert k == [1] and len(references) == 1
        return {"pass@1": float("return 1" in predictions[0][0])}, {}

    monkeypatch.setattr(evaluate, "load", lambda name: SimpleNamespace(compute=compute))
    with pytest.raises(UserError, match="'humaneval' runs the code that the model writes"):
        load_tasks(["humaneval"], data_path=str(folder))
    tasks = load_tasks(["humaneval"], data_path=str(folder), run_code=True)
    answers(monkeypatch, " return 1", " return 0", " return 1")
    found = score(wide_model, tokenizer, tasks)["humaneval"]
    assert found["metric"] == "pass@1" and found["value"] == pytest.approx(2 / 3)
    assert items.unpack(found).tolist() == [1, 0, 1]


@pytest.fixture
def checkers(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Stand-ins of what the checkers of IFEval import; ``data.find`` says whether their own data is there."""
    data = SimpleNamespace(find=lambda path: path)
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    stand_ins: dict[str, dict[str, Any]] = {
        "langdetect": {},
        "immutabledict": {"immutabledict": dict},
        "nltk": {"data": data, "download": lambda *_: False},
    }
    for name, fields in stand_ins.items():
        module = ModuleType(name)
        module.__dict__.update(fields)
        monkeypatch.setitem(sys.modules, name, module)
    yield data
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        del sys.modules[name]


def following(folder: Path) -> None:
    write(
        folder,
        "ifeval",
        train=[
            {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
            {
                "key": 2,
                "prompt": "No commas, in quotes.",
                "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
                "kwargs": [{}, {}],
            },
        ],
    )


def test_instructions_are_checked_item_by_item(folder, wide_model, tokenizer, monkeypatch, checkers) -> None:
    following(folder)
    tasks = load_tasks(["ifeval"], data_path=str(folder), num_fewshot=None)
    answers(monkeypatch, "Yes and no", "Yes and no")
    found = score(wide_model, tokenizer, tasks)["ifeval"]
    assert found["metric"] == "prompt_level_strict_acc" and found["value"] == 0.5
    assert items.unpack(found).tolist() == [1, 0]
    assert found["others"]["inst_level_strict_acc"] == pytest.approx(2 / 3)


def test_what_the_checkers_of_instructions_lack_is_said_before_they_are_asked(folder, checkers, monkeypatch) -> None:
    following(folder)

    def find(path: str) -> None:
        raise LookupError("*" * 70)

    checkers.find = find
    with pytest.raises(UserError, match=r"'ifeval' needs data of nltk: python -m nltk.downloader punkt_tab"):
        load_tasks(["ifeval"], data_path=str(folder), num_fewshot=None)
    monkeypatch.setitem(sys.modules, "langdetect", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        del sys.modules[name]
    with pytest.raises(UserError, match=r"cannot load task 'ifeval', which needs more than its data: .*langdetect"):
        load_tasks(["ifeval"], data_path=str(folder), num_fewshot=None)


def test_missing_rows_are_named(folder) -> None:
    (folder / "gsm8k" / "train.jsonl").unlink()
    assert list(load_tasks(["gsm8k"], data_path=str(folder))) == ["gsm8k"], "examples are not needed"
    (folder / "gsm8k" / "test.jsonl").write_text("")
    with pytest.raises(UserError, match=r"'gsm8k' is scored on .*gsm8k/test.jsonl, which is missing or empty"):
        load_tasks(["gsm8k"], data_path=str(folder))


def test_records_keep_what_identifies_their_tasks(task_folder) -> None:
    """As it was before there were examples, templates and groups."""
    tasks = load_tasks(["hellaswag", "arc_easy"], data_path=str(task_folder)) | load_tasks(
        ["tiny_pronoun"], data_path=None
    )
    assert {name: task_fingerprint(task, limit=None)[:16] for name, task in tasks.items()} == {
        "hellaswag": "cdafcca011121442",
        "arc_easy": "ae083750dce78f0a",
        "tiny_pronoun": "ef4dd2fedd782e63",
    }


def test_templates_of_the_harness_are_still_where_the_short_way_looks() -> None:
    """Reading one folder of the harness's index saves reading all 14,000 files of it."""
    for name, file in {"gsm8k": "gsm8k/gsm8k.yaml", "mmlu_stem": "mmlu/default/_mmlu_stem.yaml"}.items():
        loader = type("Loader", (yaml.SafeLoader,), {})
        loader.add_multi_constructor("!", lambda *_: None)
        config = yaml.load((HARNESS / file).read_text(encoding="utf-8"), Loader=loader)
        assert name in (config.get("task"), config.get("group"))
