"""Whole runs of the main job on a GPU end as on a CPU: the paper's method, plus, and out of core."""

from pathlib import Path

import pytest

from tests.gpu.device import DEVICE, ON_GPU
from tests.test_simulated_gpu import RUNS, check_same

pytestmark = ON_GPU


@pytest.mark.parametrize("overrides", RUNS.values(), ids=RUNS)
def test_a_run(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    check_same(tmp_path, overrides, program="modegpt", device=DEVICE)
