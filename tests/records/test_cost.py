"""The account at the end of a run, from an invented one."""

import copy

import pytest

from modegpt.records.cost import compression_stages, cost_rows, floor_line, floor_seconds, machine_line
from modegpt.records.summary import summary
from tests.records.sample import sample_record

COST = {
    "machine": {
        "device": "cpu",
        "gemm": {"float32": 100e9, "float64": 50e9},
        "factorisation": 20e9,
        "copy": 10e9,
        "size": 8,
    },
    "stages": [
        {"name": "loading", "seconds": 1.0, "flops": 0.0, "bytes": 0.0, "work": {}},
        {"name": "compression", "seconds": 0.5, "flops": 0.0, "bytes": 0.0, "work": {}},
        {
            "name": "statistics",
            "seconds": 4.0,
            "flops": 250e9,
            "bytes": 1e9,
            "work": {"forward float32": 100e9, "gram float64": 150e9},
            "within": "compression",
        },
        {
            "name": "decomposition",
            "seconds": 1.5,
            "flops": 45e9,
            "bytes": 12e9,
            "work": {"factorisation float64": 20e9, "product float64": 25e9},
            "within": "compression",
        },
    ],
    "peak_memory_bytes": {"host": 1},
}


def test_floor_is_work_over_rates() -> None:
    assert [stage["name"] for stage in compression_stages(COST)] == ["compression", "statistics", "decomposition"]
    assert floor_seconds(COST) == {"forward": 1.0, "gram": 3.0, "factorisation": 1.0}
    assert floor_line(COST) == "6.00 s, 1.20 x its floor of 5.00 s (forward 1.00 + gram 3.00 + factorisation 1.00)"
    assert machine_line(COST).startswith("products float32 100.0, float64 50.0 GFLOP/s, float64 Cholesky 20.0")


def test_a_stage_is_held_against_the_slower_of_arithmetic_and_memory() -> None:
    rows = {row[0].strip(): row[1:] for row in cost_rows(COST)}
    assert rows["loading"] == ("1.00", "-", "-", "-", "-")
    assert rows["statistics"] == ("4.00", "250.0", "1.00", "62.5", "100 %")
    assert rows["decomposition"] == ("1.50", "45.0", "12.00", "30.0", "100 %")
    slow = copy.deepcopy(COST)
    slow["stages"][3]["bytes"] = 7.5e9
    slow["stages"][3]["work"] = {"product float64": 25e9}
    assert cost_rows(slow)[3][-1] == "50 %"


def test_shares_of_a_probe_that_ran_slow_are_not_shown() -> None:
    """The machine was busy when its rates were taken: stages beat them, so that none of the shares means anything."""
    busy = copy.deepcopy(COST)
    busy["machine"]["gemm"] = {dtype: rate / 8 for dtype, rate in COST["machine"]["gemm"].items()}
    assert {row[-1] for row in cost_rows(busy)} == {"-"}
    assert floor_line(busy) == "6.00 s, its floor is not known: the probe ran slow"
    assert "the probe ran slow" in machine_line(busy) and "slow" not in machine_line(COST)
    text = summary(sample_record() | {"cost": sample_record()["cost"] | busy})
    assert text.count("the probe ran slow") == 2 and "x its floor" not in text
    rounded = copy.deepcopy(COST)
    rounded["stages"][2]["seconds"] = 4.0 / 1.01
    assert [row[-1] for row in cost_rows(rounded)][2] == "100 %"


def test_no_word_is_the_name_of_two_times() -> None:
    """Compression takes 6.00 s; what its stages leave of it has a name of its own, in the table and in the list."""
    assert [row[0] for row in cost_rows(COST)] == ["loading", "rest of compression", "  statistics", "  decomposition"]
    lines = summary(sample_record() | {"cost": sample_record()["cost"] | COST}).splitlines()
    assert [line for line in lines if line.startswith("compression ")] == [
        "compression  6.00 s, 1.20 x its floor of 5.00 s (forward 1.00 + gram 3.00 + factorisation 1.00)"
    ]
    [listed] = [line for line in lines if line.startswith("seconds ")]
    assert "rest of compression 0.5, statistics 4.0" in listed


@pytest.mark.parametrize("measured", [True, False])
def test_summary_shows_the_account_where_there_is_one(measured: bool) -> None:
    record = sample_record()
    if measured:
        record["cost"] = COST | {
            key: record["cost"][key] for key in ("forward_passes", "backward_passes", "calibration_tokens")
        }
    text = summary(record)
    assert ("of ceiling" in text) == ("x its floor" in text) == measured
