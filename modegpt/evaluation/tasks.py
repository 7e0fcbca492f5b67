"""From task names to lm-evaluation-harness tasks with their data loaded."""

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modegpt.data.embedded import task_configs
from modegpt.data.hub import commit_of, hub_access
from modegpt.data.texts import Documents, read_rows
from modegpt.errors import UserError, shortened
from modegpt.evaluation.isolation import isolated_harness
from modegpt.evaluation.local_tasks import in_folders, local_rows, local_splits
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
FEWSHOT_SEED = 1234
"""Which examples are drawn; the harness's own."""


@dataclass(frozen=True)
class TaskGroup:
    """A group of the harness whose score is that of all its items, such as MMLU: its tasks by name."""

    tasks: dict[str, Any]


def load_tasks(
    names: Sequence[str],
    *,
    data_path: str | None,
    documents: Documents | None = None,
    num_fewshot: int | None = 0,
    run_code: bool = False,
) -> dict[str, Any]:
    """Load tasks with their data.

    Args:
        names: ``"tiny"`` (the embedded five, or one of them by name), ``"paper"`` (``PAPER_TASKS``),
            ``"next_sentence"`` (made from ``documents``), or any task, group or tag of lm-evaluation-harness.
        data_path: folder of local files; see ``local_tasks.py`` for their forms.
        documents: the text for ``next_sentence``.
        num_fewshot: examples in the prompt, from where the task draws them, never from the rows that are scored; None:
            as many as the task has by itself.
        run_code: allow tasks that run what the model writes.

    Returns name -> ``lm_eval.api.task.Task`` or `TaskGroup`, tags spelled out, in the order asked for. A task with
    examples has their number in its name (``gsm8k_5shot``): its score is another figure than that without.
    Raises UserError on an unknown name (close ones are given), unreadable files, data out of reach, too few rows to
    take examples from, a package that a task needs, and code that may not be run.
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
        name: _local_config(name, data_path)
        for name in wanted
        if data_path is not None and name not in tiny | made and not in_folders(name, data_path)
    }
    local |= made | {name: _in_memory(config, _read_data_files(config)) for name, config in tiny.items()}
    loaded: dict[str, Any] = {}
    with isolated_harness():
        from lm_eval.api.task import ConfigurableTask

        for name in wanted:
            if name in local:
                loaded[name] = ConfigurableTask(config=local[name])
            elif name in STANDARD_TASKS and data_path is None:
                with hub_access(f"the data of task {name}", LOCAL_REMEDY):
                    loaded[name] = ConfigurableTask(config=_standard_config(name, training=num_fewshot != 0))
            else:
                loaded |= _other_tasks(name, data_path)
        for task in flat(loaded).values():
            _settle(task, num_fewshot, run_code=run_code)
    return {_labelled(name, task): task for name, task in loaded.items()}


def flat(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """``tasks`` with those of groups in the groups' places."""
    spelled = [task.tasks if isinstance(task, TaskGroup) else {name: task} for name, task in tasks.items()]
    return {name: task for each in spelled for name, task in each.items()}


def redraw_examples(task: Any) -> None:
    """Begin to draw the examples anew, so that every model sees the same ones before the same item."""
    task.set_fewshot_seed(FEWSHOT_SEED)


def _settle(task: Any, num_fewshot: int | None, *, run_code: bool) -> None:
    """Set the number of examples and hold the rows. Raises UserError for what the task lacks or must not do."""
    name = task.config.task
    if num_fewshot is not None:
        task.set_config(key="num_fewshot", value=num_fewshot)
    if getattr(task, "UNSAFE_CODE", False) and not run_code:
        raise UserError(
            f"task {name!r} runs the code that the model writes, on this machine; "
            "set evaluation.zeroshot.run_code=true to allow it"
        )
    if (count := task.config.num_fewshot or 0) > 0:
        pool = task.sampler.df if _has_examples(task) else []
        if len(pool) < count:
            raise UserError(
                f"evaluation.zeroshot.num_fewshot={count}: task {name!r} has {len(pool)} rows to take examples from, "
                "apart from those that it scores"
            )
    _hold_rows(task)


def _has_examples(task: Any) -> bool:
    """Whether the task's examples are others than the rows that it scores."""
    config, scored = task.config, task.config.test_split or task.config.validation_split
    if task.fewshot_cfg.samples is not None:
        return True
    return (task.fewshot_cfg.split or config.training_split or config.validation_split or scored) != scored


def _labelled(name: str, task: Any) -> str:
    """The task's name, with the number of examples in the prompt where there are any."""
    parts = [*task.tasks.values()] if isinstance(task, TaskGroup) else [task]
    counts = sorted({part.config.num_fewshot or 0 for part in parts})
    return name if counts == [0] else f"{name}_{'_'.join(map(str, counts))}shot"


def task_fingerprint(task: Any, *, limit: int | None) -> str:
    """sha256 of what a task asks: its prompt templates and every item scored; of a group, of all its tasks."""
    if isinstance(task, TaskGroup):
        parts = {name: task_fingerprint(part, limit=limit) for name, part in task.tasks.items()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    config = task.dump_config()
    keys = ["output_type", "doc_to_text", "doc_to_choice", "doc_to_target", "target_delimiter"]
    keys += ["description"] if config.get("description") else []
    if config.get("output_type") == "generate_until":
        keys += ["generation_kwargs", "filter_list"]
    examples = config.get("num_fewshot") or 0
    if examples:
        keys += ["num_fewshot", "fewshot_delimiter"]
    digest = hashlib.sha256(json.dumps({key: str(config.get(key)) for key in keys}, sort_keys=True).encode())
    docs = [doc for _, doc in task.doc_iterator(limit=limit)]
    for doc in [*docs, *(task.sampler.df if examples else ())]:
        digest.update(json.dumps(dict(doc), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def task_commits(task: Any) -> dict[str, str]:
    """The commit of the hub's repository that a task's items are from, by its name; empty for other items."""
    if isinstance(task, TaskGroup):
        return {name: commit for part in task.tasks.values() for name, commit in task_commits(part).items()}
    return (task.config.metadata or {}).get("hub", {})


def _standard_config(name: str, *, training: bool = False) -> dict[str, Any]:
    """A standard task's configuration, with the split that is scored and, for examples, that of ``training``."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    file, split = STANDARD_TASKS[name]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / file, resolve_func=True)
    config.pop("tag", None)
    splits = {"validation_split": None, "test_split": None, f"{split}_split": split}
    return config | splits | ({} if training else {"training_split": None})


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
        if (commit := commit_of(task.dataset[split])) is not None:
            hub = {f"datasets/{task.config.dataset_path}": commit}
            task.set_config(key="metadata", value={**(task.config.metadata or {}), "hub": hub})
        process = task.config.process_docs or list
        task.dataset = {split: list(process(task.dataset[split]))}
        task.set_config(key="process_docs", value=None)


def _other_tasks(name: str, data_path: str | None) -> dict[str, Any]:
    """Any task, group or tag of the harness, its data from the hub or from folders below ``data_path``."""
    manager = _manager_of(name)
    source = (
        hub_access(f"the data of {name}", "this task needs the hub, or its cache")
        if data_path is None
        else _data_from(data_path)
    )
    try:
        with source:
            loaded = manager.load([name])
    except UserError:
        raise
    except (ImportError, OSError) as error:  # of what the task's own code imports or fetches
        raise UserError(f"cannot load task {name!r}, which needs more than its data: {shortened(str(error))}") from None
    for task in loaded["tasks"]:
        _check_instructions(task)
    group = loaded["groups"].get(name)
    weighted = [metric.weight_by_size for metric in (group.aggregate_metric_list or ())] if group else []
    if weighted and all(weighted):
        return {name: TaskGroup(loaded["tasks"])}
    return loaded["tasks"]


def _check_instructions(task: str) -> None:
    """Raise UserError for IFEval where data is missing that its checkers would look for after the model has written."""
    if "ifeval" in task:
        import nltk

        try:
            nltk.data.find("tokenizers/punkt_tab")  # which the task has tried to download by now
        except LookupError:
            raise UserError(f"task {task!r} needs data of nltk: python -m nltk.downloader punkt_tab") from None


def _manager_of(name: str) -> Any:
    """The harness's index of tasks: of one of its folders where ``name`` says which, as that of all takes 7 to 12 s.

    Raises UserError for an unknown name.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.tasks.__file__).parent / name.split("_")[0]
    if folder.is_dir():
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if name in manager.all_tasks:
            return manager
    manager = TaskManager()
    if name in manager.all_tasks:
        return manager
    close = difflib.get_close_matches(name, [*manager.all_tasks, "tiny", "paper", NEXT_SENTENCE], n=3)
    hint = (
        f"did you mean {', '.join(close)}?" if close else "see `lm-eval ls tasks` for the names, or use tiny or paper"
    )
    raise UserError(f"unknown task {name!r} in evaluation.zeroshot.tasks; {hint}")


@contextmanager
def _data_from(folder: str) -> Iterator[None]:
    """Inside, the harness's tasks get the rows of their own folder below ``folder`` in place of a download."""
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    download = ConfigurableTask.download

    def read(task: Any, *_: object, **__: object) -> None:
        config = task.config
        rows = local_splits(config.task, folder, scored=config.test_split or config.validation_split)
        named = (config.training_split, config.validation_split, config.test_split, task.fewshot_cfg.split)
        for split in filter(None, named):
            rows.setdefault(split, [])  # what is not scored need not be there
        task.dataset = DatasetDict({split: Dataset.from_list(found) for split, found in rows.items()})

    ConfigurableTask.download = read
    try:
        yield
    finally:
        ConfigurableTask.download = download
