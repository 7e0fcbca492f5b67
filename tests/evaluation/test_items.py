"""Standard errors of differences and ratios from the items that both models answered."""

import math

import numpy as np
import pytest

from modegpt.evaluation.items import difference_stderr, pack, retention_stderr, unpack
from modegpt.records.scores import accuracies
from modegpt.records.scores import difference_stderr as difference_of_records
from tests.records.sample import sample_record, scored, with_items


def drawn(generator: np.random.Generator, num_items: int) -> tuple[dict, dict]:
    """Two models on the same items: hard and easy ones, and each model's own luck."""
    ease = generator.choice([0.05, 0.5, 0.95], size=num_items)
    return scored(generator.random(num_items) < ease), scored(generator.random(num_items) < 0.85 * ease)


@pytest.mark.parametrize("num_items", [1, 7, 8, 9, 1000])
def test_bits_come_back(num_items):
    right = np.random.default_rng(0).random(num_items) < 0.3
    score = scored(right.tolist())
    assert unpack(score).tolist() == right.tolist()
    assert len(score["right"]) == 2 * math.ceil(num_items / 8)


def test_items_that_are_neither_right_nor_wrong_are_not_packed():
    assert pack([0.0, 0.5, 1.0]) is None and pack([0.0, 1.0]) == "40"
    assert unpack({"num_items": 3}) is None and unpack({"num_items": 3, "right": None}) is None


def test_one_task_by_hand():
    own, other = scored([1, 1, 0, 1, 0]), scored([1, 0, 0, 0, 1])
    assert difference_stderr([own], [other]) == pytest.approx(np.std([0, 1, 0, 1, -1], ddof=1) / math.sqrt(5))
    ratio = 3 / 2  # of accuracies 0.6 and 0.4
    assert retention_stderr([other], [own]) == pytest.approx(
        np.std([1 - ratio, 1, 0, 1, -ratio], ddof=1) / math.sqrt(5) / 0.4
    )


@pytest.mark.parametrize("num_items", [2, 10, 300])
def test_no_error_is_zero_and_one_item_that_differs_is_more_than_none(num_items):
    """All alike: the error of one item in two more, however the items came out; it falls as items are added."""
    for right in ([1] * num_items, [1, *[0] * (num_items - 1)]):
        same = scored(right)
        assert difference_stderr([same], [same]) == pytest.approx(1 / (num_items + 2))
        assert retention_stderr([same], [same]) == pytest.approx(1 / (num_items + 2) / np.mean(right))
    own, other = scored([1] * num_items), scored([0, *[1] * (num_items - 1)])
    assert difference_stderr([own], [other]) > 1 / (num_items + 2)
    assert difference_stderr([own, own], [own, own]) == pytest.approx(math.sqrt(2) / 2 / (num_items + 2))


def test_accuracies_of_all_or_nothing_have_an_error_in_summaries():
    record = sample_record()
    scores = record["metrics"]["dense"]["zeroshot"]
    scores["pronouns"] |= {"value": 1.0, "stderr": 0.0}
    *tasks, mean = accuracies(record)
    [pronouns] = [task for task in tasks if task.name == "zeroshot_pronouns"]
    assert pronouns.dense_stderr == 1 / 202 and pronouns.compressed_stderr == 0.03
    assert mean.dense_stderr == pytest.approx(math.hypot(0.02, 0.02, 0.02, 0.02, 1 / 202) / 5)
    assert mean.compressed_stderr == 0.013


def test_standard_errors_are_the_spread_over_test_sets():
    """Two tasks of unequal size, drawn anew 2,000 times: the errors say how much difference and ratio move, to 5 %."""
    generator = np.random.default_rng(1)
    differences, ratios, errors = [], [], []
    for _ in range(2000):
        pairs = [drawn(generator, num_items) for num_items in (400, 900)]
        dense, compressed = zip(*pairs, strict=True)
        whole, left = (np.mean([score["value"] for score in scores]) for scores in (dense, compressed))
        differences.append(left - whole)
        ratios.append(left / whole)
        errors.append((difference_stderr(compressed, dense), retention_stderr(dense, compressed)))
    expected = np.sqrt(np.mean(np.square(errors), axis=0))
    assert np.std(differences) == pytest.approx(expected[0], rel=0.05)
    assert np.std(ratios) == pytest.approx(expected[1], rel=0.05)
    unpaired = (
        math.sqrt(
            sum(
                score["value"] * (1 - score["value"]) / score["num_items"]
                for scores in (dense, compressed)
                for score in scores
            )
        )
        / 2
    )
    assert expected[0] < 0.9 * unpaired, "these items differ in ease, so pairing must help"


def test_what_cannot_be_known_is_none():
    one, other, fewer = scored([1, 0, 1]), scored([1, 1, 1]), scored([1, 0])
    silent = {key: value for key, value in one.items() if key != "right"}
    assert difference_stderr([one, silent], [other, one]) is None
    assert difference_stderr([one], [fewer]) is None
    assert difference_stderr([scored([1])], [scored([0])]) is None
    assert retention_stderr([scored([0, 0, 0])], [one]) is None


def test_records_say_it_of_each_task_and_of_the_mean():
    record, other = with_items(sample_record(), 0), with_items(sample_record(), 1)
    dense, compressed, theirs = (
        [score for task, score in scores.items() if task != "mean"]
        for scores in (
            *(record["metrics"][side]["zeroshot"] for side in ("dense", "compressed")),
            other["metrics"]["compressed"]["zeroshot"],
        )
    )
    *tasks, mean = accuracies(record)
    assert mean.retention_stderr == retention_stderr(dense, compressed)
    assert [task.retention_stderr for task in tasks] == [
        retention_stderr([a], [b]) for a, b in zip(dense, compressed, strict=True)
    ]
    assert difference_of_records(record, other, "zeroshot_mean") == difference_stderr(compressed, theirs)
    assert difference_of_records(record, other, tasks[1].name) == difference_stderr(compressed[1:2], theirs[1:2])


def test_records_without_items_say_nothing():
    record = sample_record()
    assert {score.retention_stderr for score in accuracies(record)} == {None}
    assert difference_of_records(record, record, "zeroshot_mean") is None
    assert {score.retention_stderr for score in accuracies(sample_record(dense=True))} == {None}
