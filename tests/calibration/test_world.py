"""Two Gloo processes against one: the same statistics, one all-reduce a layer, one record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modegpt.calibration.world import World, join_world
from modegpt.errors import UserError
from tests.methods.task_of import task_of

NAMES = frozenset({"mlp.C", "mlp.mean", "query_key.C_Q", "value_output.G", "layer.influence"})
WORKER = """
import sys, torch
from torch import distributed
from modegpt.calibration.world import join_world
from tests.models.family_table import dense_model
from tests.methods.task_of import task_of
from tests.calibration.test_world import NAMES
torch.manual_seed(0)
world, calls = join_world("cpu"), []
reduce = distributed.all_reduce
distributed.all_reduce = lambda *args, **kwargs: (calls.append(1), reduce(*args, **kwargs))
calibration = task_of(dense_model("llama"), 0.0).calibration
calibration.world = world
statistics = list(calibration.statistics(NAMES))
flops = calibration.meter.stages["statistics"].flops
found = {"statistics": statistics, "calls": len(calls), "flops": flops}
torch.save(found, f"{sys.argv[1]}/{world.rank}.pt")
world.leave()
"""


def torchrun(*arguments: str, timeout: int = 240) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        *arguments,
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


def test_pooled_statistics_are_those_of_one_process(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.models.family_table import dense_model

    monkeypatch.chdir(repository)
    (tmp_path / "worker.py").write_text(WORKER)
    done = torchrun(str(tmp_path / "worker.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
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


def test_a_run_under_torchrun_writes_the_record_of_one_process(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    options = [
        "quiet=true",
        "tracking=disabled",
        "evaluation=none",
        "calibration.num_samples=16",
        "calibration.sequence_length=32",
        "cache.max_bytes=0",
        "output.pictures=false",
    ]
    runs = {"two": torchrun("-m", "modegpt", f"output.root={tmp_path / 'two'}", *options)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs["one"] = subprocess.run(
        [sys.executable, "-m", "modegpt", f"output.root={tmp_path / 'one'}", *options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    records = {}
    for name, done in runs.items():
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("record.json") == 1
        (path,) = (tmp_path / name).glob("**/record.json")
        records[name] = json.loads(path.read_text())
    assert records["one"]["identity"] == records["two"]["identity"]
    for one, two in zip(records["one"]["compression"]["layers"], records["two"]["compression"]["layers"], strict=True):
        assert one["ranks"] == two["ranks"]
        assert one["relative_error"] == pytest.approx(two["relative_error"], rel=1e-9)
    assert records["one"]["compression"]["influence"] == pytest.approx(
        records["two"]["compression"]["influence"], rel=1e-10
    )


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
