"""Plus among several processes is plus in one: the same plan, weights and report, to the bit."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from modegpt.calibration.world import ALONE, World
from modegpt.errors import UserError
from modegpt.evaluation.spec import EvaluationSpec
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.prepare import prepare
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model
from tests.processes import joined, together
from tests.small_run import small

PAPERS_CHOICES = {"value_output": "values", "mlp": "leverage", "allocation": "entropic"}
NESTED = {"nested": True, "sequential": False, "refit": False, "align": False, "temperature": False}
CASES: dict[int, list[tuple[str, int, dict[str, Any]]]] = {
    2: [("opt", 8, {})],
    3: [("mixtral", 10, {}), ("qwen3", 8, PAPERS_CHOICES | {"query_key_windows": 2})],
}
"""By the number of processes: a family, how many windows, in batches of 3, and what differs from all ingredients."""


def outcome(name: str, num_samples: int, changes: dict[str, Any], *, world: World = ALONE) -> tuple[Any, ...]:
    """Weights, layers and details."""
    task = task_of(dense_model(name), 0.4, num_samples=num_samples)
    task = replace(task, calibration=replace(task.calibration, world=world))
    compressed = MoDeGPTPlus(**changes).compress(task)
    return compressed.model.state_dict(), compressed.layers, compressed.details


def work(rank: int, port: int, folder: Path, *, size: int) -> None:
    world = joined(rank, size, port)
    torch.save([outcome(*case, world=world) for case in CASES[size]], folder / f"{rank}.pt")
    world.leave()


@pytest.mark.parametrize("size", CASES)
def test_processes_arrive_at_the_bits_of_one(size: int, tmp_path: Path) -> None:
    """10 windows are 4 batches, of which two of three processes have one less, and 8 are 3, of which one of two has.

    The temperature moves all logits.
    """
    together(size, partial(work, size=size), tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(size)]
    for case, of_each in zip(CASES[size], zip(*found, strict=True), strict=True):
        weights, *facts = outcome(*case)
        for theirs, *their_facts in of_each:
            assert their_facts == facts, case
            assert theirs.keys() == weights.keys() and all(torch.equal(theirs[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("changes", "alone"),
    [
        ({"method": {"name": "modegpt_plus", "rounds": 1}}, "method.rounds=1"),
        ({"method": {"name": "modegpt_plus", **NESTED}}, "method.nested=true"),
    ],
)
def test_what_looks_at_all_layers_at_once_is_for_one_process(
    changes: dict[str, Any], alone: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    no_tasks = EvaluationSpec(None, None)
    with pytest.raises(UserError, match=f"^{alone}.* cannot share its calibration among 2 processes; .* torchrun$"):
        prepare(small(results, evaluation=no_tasks, **changes), command="modegpt")
