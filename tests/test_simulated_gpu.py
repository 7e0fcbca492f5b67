"""What a GPU would refuse is found without one: whole runs on a simulated device, with the CPU's results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modegpt.data.texts import load_documents
from tests.simulated_gpu import guards

simulated = pytest.mark.skipif(
    guards() is None or torch.version.cuda is not None,
    reason="PyTorch is built for CUDA, and its attention would ask a driver, or its table of devices is elsewhere",
)

SMALL: tuple[str, ...] = (
    "model=tiny-llama",
    "calibration.num_samples=4",
    "tracking=disabled",
    "output.pictures=false",
    "quiet=true",
    "threads=1",
)
SMALL += tuple(
    f"compression.rank_multiple.{module}={multiple}"
    for module, multiple in (("mlp", 16), ("query_key", 4), ("value_output", 4))
)
TASK = ("evaluation.zeroshot.tasks=[tiny_pronoun]", "evaluation.zeroshot.limit=4")
TIMED = (
    "evaluation.throughput.decode=[2x16]",
    "evaluation.throughput.prefill=[2x16]",
    "evaluation.throughput.repeats=1",
)
RUNS = {
    "paper, scored, timed, saved": ("calibration.precision=float32", "output.save_model=auto", *TASK, *TIMED),
    "plus": ("method=modegpt_plus", "evaluation.zeroshot.tasks=null"),
    "out of core": ("evaluation.zeroshot.tasks=null", "out_of_core.enabled=true", "output.save_model=auto"),
}


def record(folder: Path, program: str, *overrides: str) -> dict:
    environment = os.environ | {"MODEGPT_CACHE": str(folder / "cache"), "MODEGPT_TRACEBACK": "1"}
    command = [sys.executable, "-m", program, *SMALL, *overrides, f"output.root={folder}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    [path] = folder.glob("*/*/record.json")
    return json.loads(path.read_text())


def check_same(tmp_path: Path, overrides: tuple[str, ...], *, program: str, device: str) -> None:
    """``program`` on ``device`` keeps the ranks and the perplexity of the main job on the CPU."""
    text = tmp_path / "test.txt"
    text.write_text(load_documents("tiny", path=None, split="test").joined()[:6000])
    overrides += ("evaluation.perplexity.source=text", f"evaluation.perplexity.path={text}")
    gpu = record(tmp_path / "gpu", program, *overrides, f"model.device={device}")
    cpu = record(tmp_path / "cpu", "modegpt", *overrides, "model.device=cpu")
    assert bool(gpu["provenance"]["hardware"]["gpus"]) == (device != "cpu")
    assert [layer["ranks"] for layer in gpu["compression"]["layers"]] == [
        layer["ranks"] for layer in cpu["compression"]["layers"]
    ]
    for name, score in cpu["metrics"]["compressed"]["perplexity"].items():
        # attention by its definition, or by another kernel, and not by the CPU's fused one
        assert gpu["metrics"]["compressed"]["perplexity"][name]["value"] == pytest.approx(score["value"], rel=1e-4)


@simulated
@pytest.mark.parametrize("overrides", RUNS.values(), ids=RUNS)
def test_a_run_on_a_gpu_is_that_on_a_cpu(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    check_same(tmp_path, overrides, program="tests.simulated_gpu", device="cuda:0")


@simulated
def test_tensors_of_two_devices_are_refused() -> None:
    program = (
        "import torch; from tests.simulated_gpu import simulated_gpu\n"
        "with simulated_gpu():\n    torch.ones(2, 2, device='cuda') @ torch.ones(2, 2)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "tensors on cuda:0 and on the CPU" in done.stderr


@simulated
def test_sums_beside_the_forward_race_with_nothing() -> None:
    """The numbers are the same to the bit, and each safeguard is missed where it is taken away."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulated_streams"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "equal=True streams=2 races=0 lent=0",
        "forward not waiting: races=True",
        "sums not waiting: races=True",
        "memory not lent: seen=True",
    ]
