"""The throughput table holds what was measured."""

import json
from pathlib import Path

import pytest

from analysis.throughput import FILE, throughput


def test_the_table_is_the_measurement(tmp_path: Path) -> None:
    assert throughput(tmp_path) == []
    shared = {
        "speedup": 1.5,
        "ideal_speedup": 2.0,
        "share_of_ideal": 0.75,
        "tokens_per_second": 64.0,
        "model": "30% exact",
    }
    measured = {
        "settings": {"device": "cpu", "threads": 1, "dtype": "float32", "clock": "wall"},
        "provenance": {"hardware": {"cpu": "a processor", "gpus": []}},
        "compared": {
            "random": {
                "models": {"dense": {"num_parameters": 374_000_000}},
                "measurements": [
                    shared | {"phase": "prefill", "batch_size": 4, "length": 32},
                    shared | {"phase": "decode", "batch_size": 8, "length": 512},
                ],
            },
            "released": {"models": {"dense": {"num_parameters": 135_000_000}}, "measurements": []},
        },
    }
    path = tmp_path / FILE
    path.parent.mkdir()
    path.write_text(json.dumps(measured), encoding="utf-8")
    [table] = throughput(tmp_path)
    (heading, (prefill, decode)), (other, ()) = table.blocks
    assert heading == "random Llama of 374M parameters, float32, a processor, 1 thread(s)"
    assert other == "released of 135M parameters, float32, a processor, 1 thread(s)"
    assert prefill.labels == ("prefill", "4", "32", "30% exact")
    assert [cell.mean for cell in prefill.cells] == pytest.approx([64, 2000, 1.5, 2, 75])
    assert decode.cells[1].mean == pytest.approx(125)
    for device, named in (("cpu", "a processor, 1 thread(s)"), ("cuda", "a card")):
        measured["settings"]["device"], measured["provenance"]["hardware"]["gpus"] = device, [{"name": "a card"}]
        path.write_text(json.dumps(measured), encoding="utf-8")
        [table] = throughput(tmp_path)
        assert named in table.blocks[0][0], "the machine that ran it, not all that was in it"
    measured["settings"]["clock"] = "processor"
    path.write_text(json.dumps(measured), encoding="utf-8")
    assert throughput(tmp_path)[0].blocks[0][0].endswith("a card, processor seconds")


def test_the_committed_measurement_is_read(repository: Path) -> None:
    [table] = throughput(repository / "results")
    assert len(table.blocks) >= 3, "a model of random weights, a released one, and 7B on a GPU"
    for _, rows in table.blocks:
        assert len(rows) >= 3 and all(cell.values for row in rows for cell in row.cells)
