"""Gloo processes against one: the same statistics, one all-reduce a layer, layers divided, one record."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from modegpt.allocation.policies import Entropic
from modegpt.calibration.world import World, join_world
from modegpt.cli.main import main
from modegpt.decompositions import MLPNystrom, MLPRandom, QueryKeyCR, ValueOutputSVD
from modegpt.errors import UserError
from modegpt.methods.base import CompressionTask
from modegpt.methods.modegpt import MoDeGPT
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model, statistics_of
from tests.processes import STUCK_SECONDS, joined, together

NAMES = frozenset({"mlp.C", "mlp.mean", "query_key.C_Q", "value_output.G", "layer.influence"})
PATIENT = f"read_timeout={STUCK_SECONDS},join_timeout={STUCK_SECONDS},keep_alive_max_attempt={STUCK_SECONDS}"
"""A busy machine may take longer than torchrun's own clocks allow."""


def work(rank: int, port: int, folder: Path) -> None:
    """The statistics of the process's share, the calls that pooled them, and their cost."""
    world, calls = joined(rank, 2, port), []
    reduce = distributed.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return reduce(*args, **kwargs)

    distributed.all_reduce = counted
    calibration = task_of(dense_model("llama"), 0.0).calibration
    calibration.world = world
    statistics = list(calibration.statistics(NAMES))
    flops = calibration.meter.stages["statistics"].flops
    torch.save({"statistics": statistics, "calls": len(calls), "flops": flops}, folder / f"{world.rank}.pt")
    world.leave()


def test_pooled_statistics_are_those_of_one_process(tmp_path: Path) -> None:
    together(2, work, tmp_path)
    calibration = task_of(dense_model("llama"), 0.0).calibration
    alone = list(calibration.statistics(NAMES))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["calls"] == second["calls"] == calibration.num_layers
    assert first["flops"] + second["flops"] == pytest.approx(calibration.meter.stages["statistics"].flops)
    for one, other, whole in zip(first["statistics"], second["statistics"], alone, strict=True):
        assert one.keys() == whole.keys() == NAMES
        for name in NAMES:
            assert torch.equal(one[name], other[name])
            assert float((one[name] - whole[name]).norm()) <= 1e-12 * float(whole[name].norm())
        assert torch.equal(one["layer.influence"], whole["layer.influence"]), "summed in the order of one process"


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_sums_of_two_shares_make_the_statistics_of_all_windows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every statistic there is. The second process runs first, and its sums are added to those of the first one."""
    sent: list[Tensor] = []

    def statistics(world: World, reduce: Callable[[Tensor], object]) -> list[dict[str, Tensor]]:
        monkeypatch.setattr(distributed, "all_reduce", reduce)
        calibration = task_of(dense_model(name), 0.0).calibration
        calibration.world = world
        names = statistics_of(calibration.family) | {"layer.influence", "layer.num_tokens"}
        return [{key: value.clone() for key, value in layer.items()} for layer in calibration.statistics(names)]

    statistics(World(rank=1, size=2), lambda flat: sent.append(flat.clone()))
    pooled = statistics(World(rank=0, size=2), lambda flat: flat.add_(sent.pop(0)))
    alone = statistics(World(), lambda _: pytest.fail("there is nobody else"))
    assert len(pooled) == len(alone) and not sent
    for one, whole in zip(pooled, alone, strict=True):
        torch.testing.assert_close(one, whole, rtol=1e-10, atol=1e-12)


def divide(rank: int, port: int, folder: Path) -> None:
    """What a process makes of all layers, and which of them it reduced itself: divided, repeated, and with draws."""
    world = joined(rank, 3, port)
    task = task_of(dense_model("llama", num_hidden_layers=4), 0.4)
    task.calibration.world = world
    found: dict[str, Any] = {}
    reduced: list[int] = []
    compress_layer = MoDeGPT.compress_layer

    def watched(self: MoDeGPT, task: CompressionTask, index: int, *rest: Any) -> Any:
        reduced.append(index)
        return compress_layer(self, task, index, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoDeGPT, "compress_layer", watched)
        for name, method in (("divided", paper()), ("drawn", replace(paper(), mlp=MLPRandom())), ("repeated", paper())):
            if name == "repeated":
                patch.setattr(World, "divided", lambda self, jobs, device: [job() for job in jobs])
            compressed = method.compress(task)
            found[name] = (list(reduced), compressed.model.state_dict(), compressed.layers)
            reduced.clear()
        patch.undo()
    found["summed"] = summed(world, 9)
    try:
        world.divided([partial(fail, number) for number in range(5)], "cpu")
    except UserError as error:
        found["failed"] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    world.leave()


def summed(world: World, num_batches: int) -> list[Tensor]:
    """Of numbers, rows and matrices of several batches: their sums, and all of them in order."""
    generator = torch.Generator().manual_seed(0)
    dtypes = itertools.cycle([torch.float64, torch.float64, torch.float32, torch.float64])
    batches = [
        [torch.randn(size, generator=generator, dtype=dtype) for size in ((), (2,), (7, 3))]
        for _, dtype in zip(range(num_batches), dtypes, strict=False)
    ]
    totals = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in batches[0]]
    mine = world.share(batches, "batches", even=True)
    for place, batch in enumerate(mine):
        counts = world.rank + place * world.size < num_batches
        for total, tensor in zip(totals, batch, strict=True):
            world.add(total, tensor if counts else torch.zeros_like(tensor))
    world.pool(totals)
    numbers = world.in_order([float(number) for number, *_ in world.share(batches, "batches")], "cpu")
    return [*totals, torch.tensor(list(numbers))]


def paper() -> MoDeGPT:
    return MoDeGPT(mlp=MLPNystrom(), query_key=QueryKeyCR(), value_output=ValueOutputSVD(), allocation=Entropic())


def fail(number: int) -> int:
    if number in (1, 4):
        raise UserError(f"job {number} failed")
    return number


def test_layers_are_divided_among_processes_to_the_same_bits(tmp_path: Path) -> None:
    together(3, divide, tmp_path)
    processes = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(3)]
    assert [found["divided"][0] for found in processes] == [[0, 3], [1], [2]]
    assert all(found[name][0] == [0, 1, 2, 3] for found in processes for name in ("repeated", "drawn"))
    assert {found["failed"] for found in processes} == {"job 1 failed"}, "every process says so"
    for found in processes:
        assert all(map(torch.equal, found["summed"], summed(World(), 9))), "in the order of one process"
    _, weights, layers = processes[0]["repeated"]
    for found in processes:
        for name in ("divided", "repeated"):
            _, ours, reports = found[name]
            assert reports == layers and ours.keys() == weights.keys()
            assert all(torch.equal(ours[key], weights[key]) for key in weights)
        assert all(torch.equal(found["drawn"][1][key], processes[0]["drawn"][1][key]) for key in found["drawn"][1])


def test_alone_jobs_are_done_as_they_come() -> None:
    done: list[int] = []

    def jobs() -> Iterator[Callable[[], int]]:
        for number in range(3):
            yield partial(int, number)
            done.append(number)

    assert World().divided(jobs(), "cpu") == [0, 1, 2] == done


def test_a_run_under_torchrun_writes_the_record_of_one_process(
    results: Path, repository: Path, capsys: pytest.CaptureFixture
) -> None:
    options = [
        "quiet=true",
        "tracking=disabled",
        "evaluation=none",
        "calibration.num_samples=16",
        "calibration.sequence_length=32",
        "cache.max_bytes=0",
        "output.pictures=false",
        "threads=1",
    ]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "127.0.0.1:0", "--rdzv-conf", PATIENT]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "modegpt", f"output.root={results / 'two'}", *options],
        capture_output=True,
        text=True,
        timeout=STUCK_SECONDS,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert main([f"output.root={results / 'one'}", *options]) == 0
    assert done.stdout.count("record.json") == capsys.readouterr().out.count("record.json") == 1
    one, two = (json.loads(next((results / name).glob("**/record.json")).read_text()) for name in ("one", "two"))
    assert one["identity"] == two["identity"]
    for of_one, of_two in zip(one["compression"]["layers"], two["compression"]["layers"], strict=True):
        assert of_one["ranks"] == of_two["ranks"]
        assert of_one["relative_error"] == pytest.approx(of_two["relative_error"], rel=1e-9)
    assert one["compression"]["influence"] == pytest.approx(two["compression"]["influence"], rel=1e-10)


def test_shares_are_disjoint_and_complete() -> None:
    shares = [World(rank=rank, size=3).share(range(8), "things") for rank in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(8))
    with pytest.raises(UserError, match="4 processes cannot share 3 calibration batches"):
        World(rank=3, size=4).share(range(3), "calibration batches")


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    world = join_world("cpu", shared=False)
    assert world == World() and world.leads and world.told("value") == "value"
    assert world.device("cuda") == "cuda" and World(rank=3, size=4, local_rank=1).device("cuda") == "cuda:1"


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="method=sleb cannot share its calibration among 2 processes"):
        join_world("cpu", what="method=sleb", shared=False)
