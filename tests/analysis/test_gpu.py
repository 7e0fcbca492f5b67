"""What was measured on a GPU reaches the tables and the claims; what failed there is named and holds no number."""

import json
from pathlib import Path

import pytest

from analysis.claims import HOLDS, claims
from analysis.gpu import compression, gpu_parts, parts_of
from analysis.runs import damaged
from analysis.throughput import throughput

PROVENANCE = {"hardware": {"gpus": [{"name": "a card"}]}}
COST = {"seconds": 30.0, "ratio": 2.0, "peak_memory_bytes": {"host": 2**40, "cuda:0": 3 * 2**30}}
SPEED = {"phase": "prefill", "batch_size": 1, "length": 8, "speedup": 1.5, "ideal_speedup": 2.0, "share_of_ideal": 0.75}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One run of the script: a whole model, some layers of another, one that failed; the speed of one."""
    cost = [
        {"name": "7B, entropic", "status": "done", "result": COST | {"model": "7B", "method": "entropic"}},
        {"name": "70B, by layers", "status": "done", "result": COST | {"extrapolated_seconds": 300.0}},
        {"name": "7B, plus", "status": "failed", "reason": "not done after 9 s"},
    ]
    sizes = {"models": {"dense": {"num_parameters": 7e9}}, "layers": 4, "of_layers": 32}
    rows = [SPEED | {"model": name, "tokens_per_second": 64.0} for name in ("dense", "50% aligned")]
    speed = [
        {"name": "captured, prefill", "status": "done", "result": sizes | {"measurements": rows}},
        {"name": "compiled, prefill", "status": "skipped", "reason": "no time"},
    ]
    folder = tmp_path / "gpu" / "2000-01-01-000000"
    folder.mkdir(parents=True)
    for step, parts in {"cost": cost, "inference": speed}.items():
        (folder / f"{step}.json").write_text(json.dumps({"provenance": PROVENANCE, "parts": parts}), encoding="utf-8")
    return tmp_path


def test_compression(results: Path) -> None:
    assert compression(results / "none") == []
    [table] = compression(results)
    [(heading, (whole, layers, failed))] = table.blocks
    assert heading == "a card, 2000-01-01-000000"
    assert [cell.mean for cell in whole.cells] == [30, 2, 30, None, 3]
    assert [cell.mean for cell in layers.cells] == [30, 2, 300, None, 3]
    assert failed.cells[0].refused == "failed: not done after 9 s" and not any(cell.values for cell in failed.cells)


def test_speed(results: Path) -> None:
    [table] = throughput(results)
    [(heading, rows)] = table.blocks
    assert heading == "random Llama of 7000M parameters (4 of 32 layers), bfloat16, a card, captured as CUDA graphs"
    assert [row.labels[-1] for row in rows] == ["dense", "50% aligned"] and rows[1].cells[2].mean == 1.5


def test_claims(results: Path) -> None:
    found = {claim.title: claim for claim in claims([], results)}
    [hours] = found["One GPU and a few hours"].measured
    assert hours.model == "7B (random weights)" and hours.outcome == HOLDS
    assert hours.text == "30 s with entropic allocation on one a card, 3 GiB with the model on it"
    [speed] = found["The compressed model is faster"].measured
    assert speed.text == "+50 % (prefill 1 x 8, 50% aligned)"


def test_a_damaged_file_is_named_and_left_out(results: Path) -> None:
    [path] = results.glob("gpu/*/cost.json")
    path.write_text('{"provenance": {}}', encoding="utf-8")
    assert compression(results) == [] and len(gpu_parts(results, "inference")) == 2
    [refused] = damaged(results, path, parts_of)
    assert refused.path == "gpu/2000-01-01-000000/cost.json"
