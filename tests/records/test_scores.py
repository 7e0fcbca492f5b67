"""What a record scored, as one list: each figure with its own model, its own error and its own start."""

import pytest

from modegpt.evaluation.items import pack
from modegpt.records.scores import all_scores, difference_stderr, perplexities
from tests.records.sample import MEAN_STDERR, STDERR, TASKS, sample_record


def test_each_figure_is_of_its_own_model() -> None:
    scores = {score.name: score for score in all_scores(sample_record())}
    assert list(scores) == ["ppl_tiny_256", "ppl_tiny_128", *(f"zeroshot_{task}" for task in TASKS), "zeroshot_mean"]
    for task, (metric, dense, compressed) in TASKS.items():
        score = scores[f"zeroshot_{task}"]
        assert (score.label, score.metric, score.dense, score.compressed) == (task, metric, dense, compressed)
        assert (score.dense_stderr, score.compressed_stderr) == (STDERR[1], STDERR[2])
        assert (score.final, score.final_stderr) == (compressed, STDERR[2])
        assert score.retention == pytest.approx(compressed / dense) and score.is_accuracy
    mean = scores["zeroshot_mean"]
    assert (mean.label, mean.metric, mean.is_accuracy) == ("mean of 5", "mean", True)
    assert (mean.dense_stderr, mean.compressed_stderr) == (MEAN_STDERR[1], MEAN_STDERR[2])
    perplexity = scores["ppl_tiny_128"]
    assert (perplexity.label, perplexity.metric) == ("ppl_tiny_128 (128-token windows)", "perplexity")
    assert (perplexity.dense, perplexity.compressed) == (pytest.approx(4.4), pytest.approx(1.1 * 5.5))
    assert perplexity.dense_stderr is perplexity.retention is perplexity.before is None and not perplexity.is_accuracy


def test_the_final_model_of_a_dense_run_is_the_dense_one() -> None:
    for score in all_scores(sample_record(dense=True)):
        assert score.compressed is score.compressed_stderr is score.retention is score.before is None
        assert (score.final, score.final_stderr) == (score.dense, score.dense_stderr)


def test_means_over_different_tasks_have_no_error_of_their_difference() -> None:
    record, other = sample_record(), sample_record()
    for each, right in ((record, [1, 1, 1, 0]), (other, [1, 0, 1, 1])):
        for task in TASKS:
            each["metrics"]["compressed"]["zeroshot"][task] |= {"num_items": 4, "right": pack(right)}
    assert difference_stderr(record, other, "zeroshot_mean") > 0
    last = list(TASKS)[-1]
    del other["metrics"]["compressed"]["zeroshot"][last]
    assert (
        difference_stderr(record, other, "zeroshot_mean") is difference_stderr(other, record, "zeroshot_mean") is None
    )


def test_what_training_started_from_stands_beside_what_it_reached() -> None:
    record = sample_record()
    before = sample_record(sparsity=0.5)["metrics"]["compressed"]
    before["zeroshot"]["stories"]["value"] = 0.25
    record["compression"]["recovery"] = {"name": "lora", "before": before}
    scores = {score.name: score for score in all_scores(record)}
    assert scores["ppl_tiny_256"].before == pytest.approx(6.5) and scores["ppl_tiny_256"].final == pytest.approx(5.5)
    assert scores["zeroshot_stories"].before == 0.25 and scores["zeroshot_stories"].final == 0.78
    del before["perplexity"]["ppl_tiny_128"]
    assert {score.name: score.before is None for score in perplexities(record)} == {
        "ppl_tiny_256": False,
        "ppl_tiny_128": True,
    }
