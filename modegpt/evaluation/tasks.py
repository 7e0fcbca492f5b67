"""From task names to lm-evaluation-harness tasks with their data loaded."""

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modegpt.data.embedded import task_configs
from modegpt.data.hub import hub_access
from modegpt.data.texts import Documents, read_rows
from modegpt.errors import UserError
from modegpt.evaluation.isolation import isolated_harness
from modegpt.evaluation.local_tasks import local_rows
from modegpt.evaluation.next_sentence import TASK as NEXT_SENTENCE
from modegpt.evaluation.next_sentence import next_sentence_config, next_sentence_rows

PAPER_TASKS = ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge")

# Task -> its configuration inside the harness and the split that is scored. Reading these by path saves the
# harness's index of every task it knows, which takes 7 to 12 seconds.
STANDARD_TASKS = {
    "piqa": ("piqa/piqa.yaml", "validation"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "winogrande": ("winogrande/default.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test"),
}
LOCAL_REMEDY = "give local files: evaluation.zeroshot.data_path=FOLDER"


def load_tasks(names: Sequence[str], *, data_path: str | None, documents: Documents | None = None) -> dict[str, Any]:
    """Load tasks, zero-shot, with their data.

    Args:
        names: ``"tiny"`` (the embedded five, or one of them by name), ``"paper"`` (``PAPER_TASKS``),
            ``"next_sentence"`` (made from ``documents``), or any task, group or tag of lm-evaluation-harness.
        data_path: folder of local files for the standard tasks; see ``local_tasks.py`` for their forms.
        documents: the text for ``next_sentence``.

    Returns task name -> ``lm_eval.api.task.Task``, groups and tags spelled out, in the order asked for.
    Raises UserError on an unknown name (close ones are given), unreadable files, or data out of reach.
    """
    embedded = task_configs() if any(name.startswith("tiny") for name in names) else {}
    sets = {"tiny": list(embedded), "paper": list(PAPER_TASKS)}
    wanted = list(dict.fromkeys(task for name in names for task in sets.get(name, [name])))
    tiny = {name: config for name, config in embedded.items() if name in wanted}
    for name in wanted:
        if name.startswith("tiny") and name not in tiny:
            raise UserError(
                f"unknown task {name!r} in evaluation.zeroshot.tasks; the embedded ones are {', '.join(embedded)}"
            )
    made = {name: _next_sentence(documents) for name in wanted if name == NEXT_SENTENCE}
    local = {
        name: _local_config(name, data_path) for name in wanted if data_path is not None and name not in tiny | made
    }
    local |= made | {name: _in_memory(config, _read_data_files(config)) for name, config in tiny.items()}
    tasks: dict[str, Any] = {}
    with isolated_harness():
        from lm_eval.api.task import ConfigurableTask

        for name in wanted:
            if name in local:
                tasks[name] = ConfigurableTask(config=local[name])
            elif name in STANDARD_TASKS:
                with hub_access(f"the data of task {name}", LOCAL_REMEDY):
                    tasks[name] = ConfigurableTask(config=_standard_config(name))
        others = [name for name in wanted if name not in tasks]
        tasks |= _other_tasks(others) if others else {}
        for task in tasks.values():
            task.set_config(key="num_fewshot", value=0)
            _hold_rows(task)
    return tasks


def task_fingerprint(task: Any, *, limit: int | None) -> str:
    """sha256 of what a task asks: its prompt templates and every item scored."""
    config = task.dump_config()
    templates = {
        key: str(config.get(key))
        for key in ("output_type", "doc_to_text", "doc_to_choice", "doc_to_target", "target_delimiter")
    }
    digest = hashlib.sha256(json.dumps(templates, sort_keys=True).encode())
    for _, doc in task.doc_iterator(limit=limit):
        digest.update(json.dumps(dict(doc), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _standard_config(name: str) -> dict[str, Any]:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    file, split = STANDARD_TASKS[name]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / file, resolve_func=True)
    config.pop("tag", None)
    splits = {"training_split": None, "validation_split": None, "test_split": None, f"{split}_split": split}
    return config | splits


def _local_config(name: str, data_path: str) -> dict[str, Any]:
    rows = local_rows(name, data_path)  # refuses a name it has no form for
    return _in_memory(_standard_config(name), {STANDARD_TASKS[name][1]: rows})


def _next_sentence(documents: Documents | None) -> dict[str, Any]:
    if documents is None:
        raise UserError(
            f"evaluation.zeroshot.tasks: {NEXT_SENTENCE} is made from the text of the perplexity; "
            "name one by evaluation.perplexity.source"
        )
    return _in_memory(next_sentence_config(), {"test": next_sentence_rows(documents)})


def _read_data_files(config: dict[str, Any]) -> dict[str, list[dict]]:
    return {
        split: [row for _, row in read_rows(file)] for split, file in config["dataset_kwargs"]["data_files"].items()
    }


def _in_memory(config: dict[str, Any], rows_by_split: dict[str, list[dict]]) -> dict[str, Any]:
    """``config`` over rows already in memory: no data set cache is written, and nothing stale is read from one."""
    import datasets

    data = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in rows_by_split.items()})
    return config | {
        "dataset_path": None,
        "dataset_name": None,
        "dataset_kwargs": None,
        "custom_dataset": lambda **_: data,
    }


def _hold_rows(task: Any) -> None:
    """Process and decode the rows once.

    The harness does so twice for every model, at a tenth of a millisecond a row and more.
    """
    split = task.config.test_split or task.config.validation_split
    if split is not None:
        process = task.config.process_docs or list
        task.dataset = {split: list(process(task.dataset[split]))}
        task.set_config(key="process_docs", value=None)


def _other_tasks(names: list[str]) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, [*manager.all_tasks, "tiny", "paper", NEXT_SENTENCE], n=3)
            hint = (
                f"did you mean {', '.join(close)}?"
                if close
                else "see `lm-eval ls tasks` for the names, or use tiny or paper"
            )
            raise UserError(f"unknown task {name!r} in evaluation.zeroshot.tasks; {hint}")
    with hub_access(f"the data of {', '.join(names)}", "these tasks need the hub, or its cache"):
        return manager.load(names)["tasks"]
