"""The store as a table."""

from pathlib import Path

import pandas
import pytest

from modegpt.errors import UserError
from modegpt.records.frame import load_records
from modegpt.records.store import RecordStore
from tests.records.sample import sample_record, sample_throughput


def test_a_row_a_record_with_its_values(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for sparsity in (0.1, 0.3):
        for seed in (0, 1):
            store.write(sample_record(sparsity=sparsity, seed=seed))
    store.write(sample_record(dense=True))
    frame = load_records(tmp_path)
    assert len(frame) == 5 and frame["hash"].is_unique
    one = frame.query("target_sparsity == 0.3 and seed_run == 1 and method == 'modegpt'").iloc[0]
    expected = {
        "model": "tiny-llama",
        "mlp": "nystrom",
        "query_key": "cr",
        "value_output": "svd",
        "allocation": "entropic",
        "calibration": "tiny",
        "calibration_seed": 1,
        "calibration_num_samples": 128,
        "achieved_sparsity": 0.299,
        "ppl_tiny_256": 5.6,
        "dense_ppl_tiny_128": 4.4,
        "zeroshot_hard_facts": 0.72,
        "zeroshot_hard_facts_stderr": 0.03,
        "dense_zeroshot_hard_facts_stderr": 0.02,
        "zeroshot_mean_stderr": 0.013,
        "zeroshot_hard_facts_metric": "acc_norm",
        "dense_zeroshot_mean": 0.86,
        "retention_hard_facts": 0.8,
        "seconds": 5.0,
        "seconds_compress": 1.5,
        "peak_memory_bytes": 3 * 2**29,
        "limited": False,
        "schema_version": 2,
    }
    for column, value in expected.items():
        assert one[column] == (pytest.approx(value) if isinstance(value, float) else value), column
    assert (tmp_path / one["path"]).is_file()
    dense = frame.query("method == 'dense'").iloc[0]
    assert dense["ppl_tiny_256"] == dense["dense_ppl_tiny_256"] == 4.0
    assert dense["achieved_sparsity"] == 0.0 and pandas.isna(dense["mlp"]) and pandas.isna(dense["retention_mean"])
    means = frame.query("method == 'modegpt'").groupby("target_sparsity")["ppl_tiny_256"].mean()
    assert means.to_dict() == pytest.approx({0.1: 4.55, 0.3: 5.55})


def test_reconstruction_errors_are_averaged_over_the_layers_that_have_one(tmp_path: Path) -> None:
    record = sample_record()
    for index, layer in enumerate(record["compression"]["layers"]):
        layer["relative_error"] = {"mlp": index / 10, "query_key": None}
    RecordStore(tmp_path).write(record)
    frame = load_records(tmp_path)
    assert frame["relative_error_mlp"].item() == pytest.approx(0.25)
    assert "relative_error_query_key" not in frame


def test_empty_and_absent_stores(tmp_path: Path) -> None:
    assert len(load_records(tmp_path)) == 0
    with pytest.raises(UserError, match="not a directory"):
        load_records(tmp_path / "nowhere")


def test_speeds_are_columns_by_workload(tmp_path: Path) -> None:
    record = sample_record()
    record["metrics"]["throughput"] = sample_throughput(1.25)
    RecordStore(tmp_path).write(record)
    [row] = load_records(tmp_path).to_dict("records")
    assert row["decode_8x64_tokens_per_second"] == pytest.approx(2500) and row[
        "dense_decode_8x64_tokens_per_second"
    ] == pytest.approx(2000)
    assert row["prefill_1x64_milliseconds"] == pytest.approx(51.2) and row[
        "dense_prefill_1x64_milliseconds"
    ] == pytest.approx(64)
    assert (row["decode_1x64_speedup"], row["decode_1x64_ideal_speedup"], row["speedup_decode"]) == (1.25, 2.0, 1.25)
    assert (row["cache_bytes_per_token"], row["dense_cache_bytes_per_token"]) == (384, 512)
