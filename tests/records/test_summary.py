"""The table that ends a run."""

import pytest

from modegpt.records.summary import number, percent, summary, text_table
from tests.records.sample import sample_record, sample_throughput


def cells(text: str, start: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return " ".join(line.split())


def test_dense_against_compressed() -> None:
    text = summary(sample_record(), record_path="results/demo/x/record.json", pictures=["scores.png", "layers.png"])
    assert text.splitlines()[0] == "tiny-llama by modegpt: 29.90 % of the block-linear weights removed (30 % asked)"
    assert cells(text, "ppl_tiny_256") == "ppl_tiny_256 (256-token windows) 4.00 5.50 x 1.38"
    assert cells(text, "pronouns") == "pronouns (acc) 78.0 ± 2.0 % 75.0 ± 3.0 % 96.2 %"
    assert cells(text, "easy_facts") == "easy_facts (acc_norm) 96.0 ± 2.0 % 90.0 ± 3.0 % 93.8 %"
    assert cells(text, "mean of") == "mean of 5 86.0 ± 0.9 % 79.0 ± 1.3 % 91.9 %"
    assert cells(text, "parameters") == "parameters 1,000,000 760,800 76.1 %"
    assert cells(text, "block-linear") == "block-linear weights 800,000 560,800 70.1 %"
    assert cells(text, "seconds") == "seconds 5.0 (calibrate 3.5, compress 1.5)"
    assert cells(text, "peak memory") == "peak memory host 1.50 GiB"
    assert cells(text, "record") == "record results/demo/x/record.json"
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("picture")] == [
        "scores.png",
        "layers.png",
    ]
    assert "LIMITED" not in text


def test_what_training_started_from_is_shown() -> None:
    record = sample_record()
    before = sample_record(sparsity=0.5)["metrics"]["compressed"]
    record["compression"]["recovery"] = {"name": "lora", "targets": "all", "num_steps": 7, "before": before}
    text = " ".join(summary(record).split())
    assert "lora on all, 7 steps from ppl_tiny_256 6.50, ppl_tiny_128 7.15, " in text.replace("(", "").replace(")", "")


def test_warnings_stand_below_the_title() -> None:
    record = sample_record()
    record["compression"]["warnings"] = ["the target is missed", "the influences spread"]
    lines = summary(record).splitlines()
    assert lines[1:3] == ["WARNING: the target is missed", "WARNING: the influences spread"]
    assert "WARNING" not in summary(sample_record()) and "WARNING" not in summary(sample_record(dense=True))


def test_limited_scores_say_so() -> None:
    record = sample_record()
    record["metrics"]["limited"] = True
    assert "LIMITED" in summary(record)


def test_a_dense_run_has_one_column_of_numbers() -> None:
    text = summary(sample_record(dense=True))
    assert cells(text, "ppl_tiny_256").endswith("4.00 - -") and cells(text, "parameters") == "parameters 1,000,000 - -"


def test_scores_that_were_not_taken_leave_no_rows() -> None:
    record = sample_record()
    record["metrics"]["dense"]["zeroshot"] = record["metrics"]["compressed"]["zeroshot"] = {}
    text = summary(record)
    assert "mean of" not in text and "ppl_tiny_128" in text


def test_a_task_without_an_accuracy_is_shown_as_the_number_it_is() -> None:
    record = sample_record()
    for which, value in (("dense", 3.5), ("compressed", 7.0)):
        record["metrics"][which]["zeroshot"] = {
            "lambada": {"metric": "perplexity_of_words", "value": value, "stderr": None, "num_items": 9},
            "mean": {"value": None, "stderr": None, "num_tasks": 0, "limit": None},
        }
    text = summary(record)
    assert cells(text, "lambada") == "lambada (perplexity_of_words) 3.50 7.00 x 2.00" and "mean" not in text


def test_a_mean_may_be_a_bare_number() -> None:
    record = sample_record()
    for which, value in (("dense", 0.86), ("compressed", 0.79)):
        record["metrics"][which]["zeroshot"]["mean"] = value
    assert cells(summary(record), "mean of") == "mean of 5 86.0 % 79.0 % 91.9 %"


@pytest.mark.parametrize(("value", "text"), [(5.123, "5.12"), (12345.6, "12,345.60"), (1.5e7, "1.50e+07"), (None, "-")])
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


def test_percent_and_columns() -> None:
    assert percent(0.5) == "50.0 %" and percent(0.5, 0.01) == "50.0 ± 1.0 %" and percent(None) == "-"
    assert text_table(["a", "b"], [["long", "1"], ["x", "10"]]) == "a      b\n----  --\nlong   1\nx     10"


def test_speeds_have_a_row_a_workload() -> None:
    record = sample_record()
    record["metrics"]["throughput"] = sample_throughput(speedup=1.5)
    for dense, compressed in zip(*[iter(record["metrics"]["throughput"]["measurements"])] * 2, strict=True):
        row = cells(summary(record), f"{dense['phase']} {dense['batch_size']} x {dense['length']} (tokens/s)")
        for each in (dense, compressed):
            assert number(each["tokens_per_second"], 0) in row
        assert f"x {number(compressed['speedup'])} of x {number(compressed['ideal_speedup'])}" in row
