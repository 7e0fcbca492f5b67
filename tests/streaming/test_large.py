"""A 1.3B-shaped checkpoint (bf16, 2.7 GB on disk) compressed by the main job in under 4 GiB.

It takes minutes, so ``make test-slow`` alone runs it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.large_model import write_random_checkpoint
from modegpt.models.integrity import check_files
from modegpt.records.store import RecordStore, load_record

pytestmark = [pytest.mark.slow, pytest.mark.large]
LIMIT_BYTES = 4 * 2**30
FREE_BYTES = 8 * 10**9


def test_a_13b_shape_is_compressed_under_4_gib(tmp_path: Path, repository: Path) -> None:
    if shutil.disk_usage(tmp_path).free < FREE_BYTES:
        pytest.skip(f"needs {FREE_BYTES / 1e9:.0f} GB of free disk")
    dense, target, results = (tmp_path / name for name in ("dense", "compressed", "results"))
    try:
        config = write_random_checkpoint(dense, "1.3b")
        overrides = [
            "model=local",
            "model.name=random-1.3b",
            f"model.path={dense}",
            "evaluation=none",
            "tracking=disabled",
        ]
        overrides += [
            "allocation=uniform",
            "calibration.num_samples=2",
            "calibration.sequence_length=256",
            f"out_of_core.max_host_bytes={LIMIT_BYTES}",
        ]
        overrides += ["out_of_core.enabled=true", f"output.save_model={target}", f"output.root={results}"]
        subprocess.run(
            [sys.executable, "-m", "modegpt", *overrides], check=True, env=os.environ | {"PYTHONPATH": str(repository)}
        )
        (path,) = RecordStore(results).paths()
        compression = load_record(path)["compression"]
        memory = compression["details"]["out_of_core"]
        assert (
            memory["measured_peak_bytes"]["host"]
            <= memory["predicted_peak_bytes"]["host"]["total"] * 1.05
            < LIMIT_BYTES * 1.05
        )
        assert memory["measured_peak_bytes"]["host"] < LIMIT_BYTES
        assert compression["achieved_sparsity"] == pytest.approx(0.3, abs=1e-4)
        check_files(target)
        assert len(json.loads((target / "config.json").read_text())["intermediate_sizes"]) == config.num_hidden_layers
    finally:
        for weights in (dense, target):
            shutil.rmtree(weights, ignore_errors=True)
