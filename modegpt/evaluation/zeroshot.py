"""Tasks through lm-evaluation-harness, reported the way the paper does."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.evaluation.begun import Begun
from modegpt.evaluation.isolation import isolated_harness
from modegpt.evaluation.items import ACCURACIES, is_accuracy, pack, share_right, unpack
from modegpt.evaluation.tasks import TaskGroup, flat, redraw_examples
from modegpt.progress import Progress

METRIC_EXCEPTIONS = {"tiny_pronoun": "acc"}
"""The metric of a task is acc_norm where the task reports one and acc otherwise, as in the paper, where WinoGrande
reports acc alone. The embedded pronoun task mirrors WinoGrande, so it is read the same way."""
BOOTSTRAP_ITERATIONS = 100
"""Drawn only for metrics without a closed-form standard error; 0 would drop the closed forms too."""


def zeroshot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Any],
    *,
    batch_size: int,
    max_length: int,
    limit: int | None,
    encodings: dict,
    progress: Progress,
    begun: Begun | None = None,
    apply_chat_template: bool = False,
) -> dict[str, dict]:
    """Score ``tasks`` (of ``load_tasks``).

    Args:
        batch_size: requests in one forward pass; results do not depend on it beyond rounding.
        max_length: the model's context in tokens. Longer requests lose tokens on the left and are counted.
        limit: score the first items of each task only.
        encodings: tokens by request, filled here; pass the same dict for another model with this tokenizer.
        begun: where answers are kept as they are found, and taken from.
        apply_chat_template: ask as the tokenizer's chat template does, examples as turns of the conversation.

    Returns, by task name, ``metric, value, stderr, num_items, num_truncated``, of ``acc`` and ``acc_norm`` what the
    task reports (``acc, acc_stderr``), where it reports another metric all its figures (``others``), and for an
    accuracy ``right``: which items were answered right by ``metric`` (see ``modegpt.evaluation.items``). A group's
    score is that of all items of its tasks, whose own values are in ``tasks``. ``"mean"`` holds ``value, stderr,
    num_tasks, limit`` over the tasks that report an accuracy. A standard error is None where it has no meaning (one
    item). Raises UserError on NaN or infinite logits.
    """
    with progress.bar(total=0, description="zero-shot tasks", unit="token") as bar, isolated_harness():
        from lm_eval.evaluator import evaluate

        from modegpt.evaluation.harness_model import HarnessModel

        scorer = HarnessModel(
            model,
            tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            encodings=encodings,
            bar=bar,
            begun=begun or Begun(),
        )
        single = flat(tasks)
        for task in single.values():
            redraw_examples(task)
        with _observed(single) as items:
            raw = evaluate(
                lm=scorer,
                task_dict={"tasks": single},
                limit=limit,
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
                log_samples=False,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=apply_chat_template,
                confirm_run_unsafe_code=True,  # what may not be run is refused when it is loaded
            )
    parts = {name: _task_score(name, raw["results"][name], items[name]) for name in single}
    for name, task in single.items():
        parts[name]["num_truncated"] = scorer.num_truncated[task.config.task]
    scores = {
        name: _group_score({part: parts[part] for part in task.tasks}) if isinstance(task, TaskGroup) else parts[name]
        for name, task in tasks.items()
    }
    for name, score in scores.items():
        if score["num_truncated"]:
            longer = f"{score['num_truncated']} requests were longer than the context of {max_length} tokens"
            progress.say(f"{name}: {longer} and lost their beginning")
    return scores | {"mean": mean_score(scores, limit=limit)}


@contextmanager
def _observed(tasks: Mapping[str, Any]) -> Iterator[dict[str, list[Mapping[str, Any]]]]:
    """Inside, what each task makes of an answer is noted: task name -> metrics of each item in order.

    A task with several filters of answers goes through its items once for each. The harness's own log of samples has
    all this too, but with prompts, answers and hashes that cost more than the scoring.
    """
    noted: dict[str, list[Mapping[str, Any]]] = {name: [] for name in tasks}

    def note(name: str, process: Callable[..., Mapping[str, Any]], *answer: Any) -> Mapping[str, Any]:
        noted[name].append(process(*answer))
        return noted[name][-1]

    for name, task in tasks.items():
        task.process_results = partial(note, name, task.process_results)
    try:
        yield noted
    finally:
        for task in tasks.values():
            del task.process_results


def mean_score(scores: Mapping[str, dict], *, limit: int | None) -> dict[str, float | int | None]:
    """Mean over tasks, and its standard error: the root of the sum of squares of theirs, over their number."""
    accuracies = [score for score in scores.values() if is_accuracy(score)]
    if not accuracies:
        return {"value": None, "stderr": None, "num_tasks": 0, "limit": limit}
    errors = [score["stderr"] for score in accuracies]
    return {
        "value": sum(score["value"] for score in accuracies) / len(accuracies),
        "stderr": None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(accuracies),
        "num_tasks": len(accuracies),
        "limit": limit,
    }


def _task_score(name: str, raw: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # the harness names a metric "acc,none": the metric and the filter of the answers
    values = {key.split(",")[0]: value for key, value in reversed(list(raw.items())) if "," in key}
    metrics = [metric for metric in reversed(values) if not metric.endswith("_stderr")]
    metric = METRIC_EXCEPTIONS.get(name) or next(
        (known for known in ("acc_norm", "acc") if known in metrics), metrics[0]
    )
    stderr = _number(values.get(f"{metric}_stderr"))
    score = {"metric": metric, "value": values[metric], "stderr": stderr, "num_items": raw["sample_len"]}
    for known in dict.fromkeys(known for known in ("acc", "acc_norm", metric) if known in metrics):
        score |= {known: values[known], f"{known}_stderr": _number(values.get(f"{known}_stderr"))}
    if metric not in ACCURACIES:
        figures = {key.removesuffix(",none"): _number(value) for key, value in raw.items() if "," in key}
        score["others"] = {key: value for key, value in figures.items() if "_stderr" not in key}
    own: list[Any] = [item.get(metric) for item in items[: score["num_items"]]]
    if metric in ACCURACIES or share_right(own, score["value"]):
        score["right"] = pack(own)
    return score


def _group_score(parts: Mapping[str, dict]) -> dict[str, Any]:
    """The score of all items of some tasks together, as if they were of one."""
    rights = [unpack(score) for score in parts.values()]
    items = [item for right in rights if right is not None for item in right.tolist()]
    num_items = sum(score["num_items"] for score in parts.values())
    value = sum(score["value"] * score["num_items"] for score in parts.values()) / num_items
    whole = len(items) == num_items
    return {
        "metric": next(iter(parts.values()))["metric"],
        "value": value,
        "stderr": math.sqrt(value * (1 - value) / (num_items - 1)) if whole and num_items > 1 else None,
        "num_items": num_items,
        "num_truncated": sum(score["num_truncated"] for score in parts.values()),
        "tasks": {name: score["value"] for name, score in parts.items()},
        "right": pack(items) if whole else None,
    }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
