"""Statistics and decompositions on a GPU are those of a CPU, and sums on a second stream are the same to the bit."""

import os
import subprocess
import sys

import pytest
import torch

from modegpt.calibration.calibration import Calibration
from modegpt.calibration.moments import CHUNK_ROWS, SecondMoment
from modegpt.calibration.statistics import Statistics
from modegpt.data.tokens import CalibrationTokens
from modegpt.methods.base import CompressionTask
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.models import family_of
from modegpt.models.checkpoints import load_model
from modegpt.progress import Progress
from tests.gpu.device import DEVICE, ON_GPU
from tests.models.family_table import CONFIGS, dense_model, statistics_of, tokens
from tests.scripts import load_script

pytestmark = ON_GPU
METHODS = {
    "uniform": lambda: load_script("benchmarks/bench_compression").paper_method("uniform"),
    "entropic": lambda: load_script("benchmarks/bench_compression").paper_method("entropic"),
    "plus": MoDeGPTPlus,
}


def calibration(name: str, device: str, **options) -> Calibration:
    ids = tokens(batch=12, length=24)
    return Calibration(
        dense_model(name).to(device),
        CalibrationTokens(ids, "", ids.numel()),
        batch_size=4,
        progress=Progress(True),
        **options,
    )


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CONFIGS)
def test_statistics(name: str, precision: torch.dtype) -> None:
    names = statistics_of(family_of(CONFIGS[name]))
    ours, theirs = (
        list(calibration(name, device, precision=precision).statistics(names)) for device in (DEVICE, "cpu")
    )
    for one, other in zip(ours, theirs, strict=True):
        for statistic in names:
            scale = float(other[statistic].double().abs().max()) or 1.0
            torch.testing.assert_close(
                one[statistic].cpu().double(), other[statistic].double(), rtol=0, atol=1e-4 * scale
            )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "gemma", "phi3"])
def test_compression(name: str, method: str) -> None:
    """Ranks, errors and logits."""
    done = {}
    for device in (DEVICE, "cpu"):
        compressed = METHODS[method]().compress(CompressionTask(calibration(name, device), 0.3))
        with torch.inference_mode():
            done[device, "logits"] = compressed.model(tokens().to(device)).logits.cpu()
        done[device, "layers"] = compressed.layers
    for one, other in zip(done[DEVICE, "layers"], done["cpu", "layers"], strict=True):
        assert one["ranks"] == other["ranks"]
        assert one["relative_error"] == pytest.approx(other["relative_error"], rel=1e-2, abs=1e-4)
    torch.testing.assert_close(done[DEVICE, "logits"], done["cpu", "logits"], rtol=0.05, atol=0.05)


def beside(overlap: bool) -> list[Statistics]:
    model = load_model("embedded:tiny-llama", device=DEVICE, dtype=torch.bfloat16)
    ids = torch.randint(200, (32, 256), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(
        model,
        CalibrationTokens(ids, "", ids.numel()),
        batch_size=4,
        precision=torch.float32,
        progress=Progress(True),
        overlap=overlap and DEVICE == "cuda",
    )
    return list(calibration.statistics(statistics_of(calibration.family) - {"query_key.C_Q"}))


def test_sums_beside_the_forward_are_the_same_to_the_bit() -> None:
    plain = beside(overlap=False)
    for _ in range(20):
        for one, other in zip(beside(overlap=True), plain, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.skipif(DEVICE != "cuda", reason="the sanitizer watches CUDA only")
def test_the_sanitizer_sees_no_race() -> None:
    program = "from tests.gpu.test_calibration import beside; beside(overlap=True)"
    environment = os.environ | {"TORCH_CUDA_SANITIZER": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0 and "data race" not in done.stderr, done.stderr[-3000:]


@pytest.mark.skipif(DEVICE != "cuda", reason="half-precision products summed in float32 exist on CUDA only")
def test_half_precision_products_are_exact() -> None:
    """What is left is what the matrix units cut off each partial sum in float32, eight products at a time or more."""
    rows = torch.randn(5000, 1, 3000, device=DEVICE, dtype=torch.bfloat16)
    moment = SecondMoment.zeros(1, 3000, device=DEVICE, precision=torch.float32)
    moment.update(rows)
    x = rows[:, 0].double()
    bound = CHUNK_ROWS[torch.float32] / 8 * torch.finfo(torch.float32).eps * (x.abs().mT @ x.abs())
    assert bool(((moment.value[0] - x.mT @ x).abs() <= bound).all())
