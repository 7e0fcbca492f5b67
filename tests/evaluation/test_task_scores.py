"""What a task asks, and what becomes of the raw results: the metric that counts, errors of groups and means."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from modegpt.evaluation.items import pack
from modegpt.evaluation.tasks import TaskGroup, task_fingerprint
from modegpt.evaluation.zeroshot import _group_score, _task_score, mean_score
from tests.records.sample import scored

BOTH = {"alias": "t", "acc,none": 0.75, "acc_stderr,none": 0.1, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.2}
ITEMS = [{"acc": right, "acc_norm": other} for right, other in ((1, 1), (1, 0), (1, 1), (0, 0))]


@pytest.mark.parametrize(
    ("name", "raw", "metric", "value", "stderr"),
    [
        ("piqa", BOTH, "acc_norm", 0.5, 0.2),
        ("tiny_pronoun", BOTH, "acc", 0.75, 0.1),
        ("winogrande", {key: value for key, value in BOTH.items() if "norm" not in key}, "acc", 0.75, 0.1),
        ("piqa", BOTH | {"acc_norm_stderr,none": "N/A"}, "acc_norm", 0.5, None),
        ("piqa", BOTH | {"acc_norm_stderr,none": math.nan}, "acc_norm", 0.5, None),
    ],
)
def test_the_normalised_accuracy_counts_where_there_is_one_but_for_pronouns(
    name: str, raw: dict[str, Any], metric: str, value: float, stderr: float | None
) -> None:
    score = _task_score(name, raw | {"sample_len": 4}, ITEMS)
    assert (score["metric"], score["value"], score["stderr"], score["num_items"]) == (metric, value, stderr, 4)
    assert score["right"] == pack([item[metric] for item in ITEMS]) and "others" not in score
    assert (score["acc"], score["acc_stderr"]) == (0.75, 0.1)
    assert score.get("acc_norm") == raw.get("acc_norm,none")


def test_a_task_without_an_accuracy_reports_all_its_figures_and_its_first_metric() -> None:
    raw = {"alias": "t", "exact,strict": 0.5, "exact_stderr,strict": 0.1, "exact,loose": 0.75, "words,none": 3.0}
    items = [{"exact": right} for right in (1.0, 0.0, 1.0, 0.0)]
    score = _task_score("t", raw | {"sample_len": 4}, items)
    assert (score["metric"], score["value"], score["right"]) == ("exact", 0.5, pack([1, 0, 1, 0]))
    assert score["others"] == {"exact,strict": 0.5, "exact,loose": 0.75, "words": 3.0}
    assert "right" not in _task_score("t", raw | {"sample_len": 4}, [{"exact": 0.5}] * 4), "no share of right answers"
    graded = raw | {"exact,strict": 0.25, "sample_len": 4}
    assert "right" not in _task_score("t", graded, items), "these items are not what the figure is of"


def part(*right: int, num_truncated: int = 0) -> dict[str, Any]:
    return scored([bool(item) for item in right]) | {"num_truncated": num_truncated}


def test_the_score_of_a_group_is_that_of_all_its_items() -> None:
    one, other = part(1, 0, 1, num_truncated=2), part(0, 0, 0, 1, 0, num_truncated=3)
    score, items = _group_score({"one": one, "other": other}), np.array([1, 0, 1, 0, 0, 0, 1, 0])
    assert score["value"] == pytest.approx(items.mean()) and score["num_items"] == 8 and score["num_truncated"] == 5
    assert score["stderr"] == pytest.approx(items.std(ddof=1) / math.sqrt(8)) and score["right"] == pack(items.tolist())
    assert score["tasks"] == {"one": pytest.approx(2 / 3), "other": pytest.approx(1 / 5)} and score["metric"] == "acc"
    silent = _group_score({"one": one, "other": {key: other[key] for key in other if key != "right"}})
    assert silent["stderr"] is silent["right"] is None and silent["value"] == pytest.approx(items.mean())
    assert _group_score({"one": part(1)})["stderr"] is None, "one item has no spread"
    assert _group_score({"one": part(1, 0)})["stderr"] == 0.5


def test_the_mean_is_of_accuracies_and_its_error_that_of_independent_ones() -> None:
    accuracies = {"a": {"metric": "acc", "value": 0.5, "stderr": 0.03}, "b": {"metric": "acc_norm", "value": 0.9}}
    accuracies["b"]["stderr"] = 0.04
    words = {"metric": "perplexity_of_words", "value": 9.0, "stderr": 1.0}
    mean = mean_score(accuracies | {"w": words}, limit=7)
    assert mean == {"value": pytest.approx(0.7), "stderr": pytest.approx(0.025), "num_tasks": 2, "limit": 7}
    accuracies["a"]["stderr"] = None
    assert mean_score(accuracies, limit=None)["stderr"] is None
    assert mean_score({"w": words}, limit=3) == {"value": None, "stderr": None, "num_tasks": 0, "limit": 3}


ASKED = {"output_type": "multiple_choice", "doc_to_text": "q", "doc_to_choice": "c", "doc_to_target": "t"}


def task_of(config: dict[str, Any], *, docs: int = 3, examples: str = "e", **changes: Any) -> Any:
    rows = [{"q": str(number)} for number in range(docs)]
    return SimpleNamespace(
        dump_config=lambda: ASKED | config | changes,
        doc_iterator=lambda limit: list(enumerate(rows))[:limit],
        sampler=SimpleNamespace(df=[{"q": examples}]),
    )


@pytest.mark.parametrize(
    ("config", "changes", "matters"),
    [
        *(({}, {key: "other"}, True) for key in (*ASKED, "target_delimiter", "description")),
        ({}, {"docs": 4}, True),
        ({}, {"generation_kwargs": "g"}, False),
        ({"output_type": "generate_until"}, {"generation_kwargs": "g"}, True),
        ({"output_type": "generate_until"}, {"filter_list": "f"}, True),
        ({}, {"fewshot_delimiter": "f"}, False),
        ({}, {"examples": "other"}, False),
        ({}, {"num_fewshot": 1}, True),
        ({"num_fewshot": 1}, {"num_fewshot": 2}, True),
        ({"num_fewshot": 1}, {"fewshot_delimiter": "f"}, True),
        ({"num_fewshot": 1}, {"examples": "other"}, True),
        ({}, {"metadata": {"version": 2}}, False),
    ],
    ids=str,
)
def test_a_fingerprint_is_of_all_that_is_asked_and_nothing_else(
    config: dict[str, Any], changes: dict[str, Any], matters: bool
) -> None:
    prints = [task_fingerprint(task_of(config, **each), limit=None) for each in ({}, changes)]
    assert (prints[0] != prints[1]) == matters
    limited = [task_fingerprint(task_of(config, docs=docs), limit=3) for docs in (3, 4)]
    assert limited[0] == limited[1], "what is not scored"
    groups = [task_fingerprint(TaskGroup({"a": task_of(config, **each)}), limit=None) for each in ({}, changes)]
    assert (groups[0] != groups[1]) == matters
    assert task_fingerprint(TaskGroup({"b": task_of(config)}), limit=None) != groups[0]
