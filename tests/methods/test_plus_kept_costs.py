"""Costs of ranks that outlive the run: the same plan as measured ones, found again only where they are those that were
asked for.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modegpt.calibration.cache import StatisticsCache
from modegpt.methods.base import Compressed
from modegpt.methods.plus import method as plus
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.methods.plus.sensitivity import KeptCosts
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model

PLUS = MoDeGPTPlus()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The shares of every measurement."""
    calls: list[tuple] = []
    rank_costs = plus.rank_costs

    def noted(*arguments: Any) -> Any:
        calls.append(arguments[2])
        return rank_costs(*arguments)

    monkeypatch.setattr(plus, "rank_costs", noted)
    return calls


def compressed(root: Path | None, sparsity: float, method: MoDeGPTPlus = PLUS) -> Compressed:
    task = task_of(dense_model("llama"), sparsity, num_samples=12)
    if root is not None:
        task.calibration.cache = StatisticsCache(root=root, key="k", max_bytes=10**8)
    return method.compress(task)


def assert_same(one: Compressed, other: Compressed) -> None:
    assert all(
        torch.equal(*tensors)
        for tensors in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    )


def test_one_measurement_serves_every_rate(tmp_path: Path, measured: list) -> None:
    compressed(tmp_path, 0.2)
    again = compressed(tmp_path, 0.4)
    assert len(measured) == 1
    assert_same(again, compressed(None, 0.4))


def test_other_questions_are_measured_anew(tmp_path: Path, measured: list) -> None:
    for method in (
        MoDeGPTPlus(),
        MoDeGPTPlus(shares=(0.5,)),
        MoDeGPTPlus(skip_layers=(0,)),
        MoDeGPTPlus(value_output="values"),
    ):
        compressed(tmp_path, 0.3, method)
        assert_same(compressed(tmp_path, 0.3, method), compressed(None, 0.3, method))
    assert len(measured) == 8, "once with the cache and once without"


def test_damaged_costs_are_measured_anew(tmp_path: Path, measured: list) -> None:
    first = compressed(tmp_path, 0.3)
    file = next(tmp_path.rglob("layer001.costs-*.mlp.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        again = compressed(tmp_path, 0.3)
    assert len(measured) == 2
    assert_same(first, again)


def test_costs_come_back_to_the_bit(tmp_path: Path) -> None:
    kept = KeptCosts(
        StatisticsCache(root=tmp_path, key="k", max_bytes=10**6), {"mlp": frozenset({"mlp.C"})}, (0.5,), (1,)
    )
    costs = [{"mlp": [0.0, 1e-12, 1 / 3]}, {}, {"mlp": [0.0, 2e300, float("inf")]}]
    assert kept.load(3) is None
    kept.store(costs)
    assert kept.load(3) == costs
    assert replace(kept, shares=(0.25,)).load(3) is None
