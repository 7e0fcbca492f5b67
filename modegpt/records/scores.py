"""A record's scores as one list, dense and compressed side by side: what tables, pictures and the tracker read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modegpt.evaluation import items
from modegpt.evaluation.items import is_accuracy
from modegpt.records.schema import Record

MEAN = "mean"


@dataclass(frozen=True)
class Score:
    """One figure of merit. Accuracies are shares in [0, 1]; ``retention`` is compressed / dense accuracy, its
    standard error that of a ratio on the same items (``modegpt.evaluation.items``).

    ``name`` is unique in a record: ``ppl_<text>_<window>`` for a perplexity, ``zeroshot_<task>`` for a task's metric.
    ``compressed`` is None in the record of a dense model; where training followed, ``before`` is what it started from.
    """

    name: str
    label: str
    metric: str
    dense: float
    compressed: float | None
    dense_stderr: float | None = None
    compressed_stderr: float | None = None
    retention: float | None = None
    retention_stderr: float | None = None
    before: float | None = None
    is_accuracy: bool = False
    """Whether it is a share of right answers; some tasks of lm-evaluation-harness report something else."""

    @property
    def final(self) -> float:
        """The score of the model the run is about: the compressed one, or the dense one if there is no other."""
        return self.dense if self.compressed is None else self.compressed

    @property
    def final_stderr(self) -> float | None:
        """The standard error of ``final``."""
        return self.dense_stderr if self.compressed is None else self.compressed_stderr


def all_scores(record: Mapping[str, Any]) -> list[Score]:
    """Every score of the record: perplexities, tasks, and the tasks' mean accuracy last."""
    return [*perplexities(record), *_tasks(record)]


def accuracies(record: Mapping[str, Any]) -> list[Score]:
    """The zero-shot accuracies of the record in its order, their mean last."""
    return [score for score in _tasks(record) if score.is_accuracy]


def difference_stderr(record: Mapping[str, Any], other: Mapping[str, Any], name: str) -> float | None:
    """Standard error of the difference of two records' final models in the accuracy ``name`` (``zeroshot_<task>``).

    None where they were not asked the same items, or one of them does not say which were right.
    """
    task = name.removeprefix("zeroshot_")
    sides = [(each["metrics"]["compressed"] or each["metrics"]["dense"])["zeroshot"] for each in (record, other)]
    asked = [(each["identity"]["decides"].get("evaluation") or {}).get("tasks", {}) for each in (record, other)]
    behind = [_behind(scores, task) for scores in sides]
    if behind[0] != behind[1] or any(asked[0].get(each) != asked[1].get(each) for each in behind[0]):
        return None
    return items.difference_stderr(*([scores[each] for each in behind[0]] for scores in sides))


def perplexities(record: Mapping[str, Any]) -> list[Score]:
    """Every perplexity of the record, its window in the label."""
    dense, compressed, before = _all(record, "perplexity")
    return [
        Score(
            name=name,
            label=f"{name} ({entry['window']}-token windows)",
            metric="perplexity",
            dense=entry["value"],
            compressed=_of(compressed.get(name), "value"),
            before=_of(before.get(name), "value"),
        )
        for name, entry in dense.items()
    ]


def _tasks(record: Mapping[str, Any]) -> list[Score]:
    dense, compressed, before = _all(record, "zeroshot")
    retention = record["metrics"]["retention"]
    tasks = [task for task in sorted(dense, key=MEAN.__eq__) if _of(dense[task], "value") is not None]
    return [
        Score(
            name=f"zeroshot_{task}",
            label=f"mean of {_of(dense[task], 'num_tasks') or len(tasks) - 1}" if task == MEAN else task,
            metric=MEAN if task == MEAN else dense[task]["metric"],
            dense=_of(dense[task], "value"),
            compressed=_of(compressed.get(task), "value"),
            dense_stderr=_stderr(dense, task),
            compressed_stderr=_stderr(compressed, task),
            retention=retention.get(task),
            retention_stderr=_retention_stderr(dense, compressed, task),
            before=_of(before.get(task), "value"),
            is_accuracy=task == MEAN or is_accuracy(dense[task]),
        )
        for task in tasks
    ]


def _stderr(scores: Mapping[str, Any], task: str) -> float | None:
    """The standard error as recorded; of a task whose items were all right, or all wrong, not zero (`least_stderr`)."""
    recorded: float | None = _of(scores.get(task), "stderr")
    if recorded is None or task != MEAN:
        return items.least_stderr(scores[task]["num_items"]) if recorded == 0 else recorded
    errors = [_of(scores[each], "stderr") for each in _behind(scores, task)]
    if 0 not in errors or None in errors:
        return recorded
    return math.hypot(*(_stderr(scores, each) or 0.0 for each in _behind(scores, task))) / len(errors)


def _retention_stderr(dense: Mapping[str, Any], compressed: Mapping[str, Any], task: str) -> float | None:
    tasks = _behind(dense, task)
    return (
        items.retention_stderr([dense[each] for each in tasks], [compressed[each] for each in tasks])
        if compressed
        else None
    )


def _behind(scores: Mapping[str, Any], task: str) -> list[str]:
    """The tasks an accuracy is of: itself, or all that the mean is over."""
    return [each for each in scores if each != MEAN and is_accuracy(scores[each])] if task == MEAN else [task]


def _all(record: Mapping[str, Any], kind: str) -> tuple[Record, Record, Record]:
    metrics, recovery = record["metrics"], (record["compression"] or {}).get("recovery") or {}
    return metrics["dense"][kind], (metrics["compressed"] or {}).get(kind, {}), recovery.get("before", {}).get(kind, {})


def _of(entry: Any, key: str) -> Any:
    """A field of a task's entry; a bare number (a mean without standard error) is its own value."""
    if isinstance(entry, Mapping):
        return entry.get(key)
    return entry if key == "value" else None
