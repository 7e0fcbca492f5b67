"""The work that predictions are made from is the work that is metered."""

import pytest
import torch

from modegpt.cost.machine import measure_ceiling
from modegpt.cost.metering import Stage
from modegpt.cost.work import WorkCounter
from modegpt.decompositions.linalg import SYMMETRIC_BLOCK, add_gram
from modegpt.records.cost import compression_stages
from tests.scripts import load_script


def test_predicted_work_is_the_metered_work() -> None:
    gpu_cost = load_script("benchmarks/gpu_cost")
    shape = gpu_cost.Shape(64, 160, 4, 2, 3, target_seconds=1.0)
    arguments = {"samples": 2, "length": 16, "batch_size": 1, "sparsity": 0.3, "precision": torch.float64}
    ceiling = measure_ceiling("cpu", torch.float32, size=64, budget_seconds=0.01)
    entry = gpu_cost.measure_layers(
        shape, num_layers=3, **arguments, dtype=torch.float32, allocation="entropic", device="cpu", ceiling=ceiling
    )
    metered = dict.fromkeys(("forward", "gram", "factorisation"), 0.0)
    for stage in compression_stages(entry["cost"]):
        for kind, flops in stage["work"].items():
            if kind.split()[0] in metered:
                metered[kind.split()[0]] += flops
    predicted = gpu_cost.work(shape, num_samples=2, length=16, sparsity=0.3, allocation="entropic", block=384)
    assert metered["forward"] == pytest.approx(predicted["forward"])
    assert metered["gram"] == pytest.approx(predicted["gram"])
    small = shape.layers * shape.width**3 / 3  # a small inverse is formed in full, a large one by halves
    assert metered["factorisation"] == pytest.approx(predicted["factorisation"] + small, rel=0.1)
    assert torch.get_default_dtype() == torch.float32


def test_what_is_formed_of_a_gram_matrix_is_what_is_counted() -> None:
    gpu_cost = load_script("benchmarks/gpu_cost")
    stage = Stage("here")
    with WorkCounter(stage.add):
        add_gram(torch.zeros(1000, 1000), torch.randn(4, 1000))
    assert stage.work == {"gram float32": 2 * 4 * gpu_cost.formed(1000, SYMMETRIC_BLOCK["cpu"])}
