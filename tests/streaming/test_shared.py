"""Several processes out of core: each has hidden states of its own, one writes the checkpoint, to the same bits."""

import gc
from pathlib import Path

import pytest
import torch

from modegpt.allocation.policies import Entropic
from modegpt.decompositions import MLPNystrom, QueryKeyCR, ValueOutputSVD
from modegpt.methods.modegpt import MoDeGPT
from modegpt.methods.plus.method import MoDeGPTPlus, PlusWalk
from modegpt.models.checkpoints import load_model
from tests.processes import joined, together
from tests.streaming.streamed_task import compress_out_of_core, save_dense, task_on

PAPER = MoDeGPT(mlp=MLPNystrom(), query_key=QueryKeyCR(), value_output=ValueOutputSVD(), allocation=Entropic())


class _Stopped(Exception):
    pass


def work(rank: int, port: int, folder: Path) -> None:
    """Plus, stopped behind its first layer and gone on with, hidden states on disk; and the paper's method."""
    world = joined(rank, 2, port)
    whole = PlusWalk.layer

    def stopping(self: PlusWalk, index: int, layer: torch.nn.Module) -> object:
        if index == 1:
            raise _Stopped
        return whole(self, index, layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlusWalk, "layer", stopping)
        with pytest.raises(_Stopped):
            compress_out_of_core(MoDeGPTPlus(), folder / "dense", folder / "plus", on_disk=True, world=world)
    gc.collect()  # and with it the lock
    world.meet()
    _, checkpoint, found = compress_out_of_core(
        MoDeGPTPlus(), folder / "dense", folder / "plus", on_disk=True, world=world
    )
    _, papers, _ = compress_out_of_core(PAPER, folder / "dense", folder / "paper", world=world)
    torch.save({"found": found, "plus": checkpoint, "paper": papers}, folder / f"{rank}.pt")
    world.meet()
    world.leave()


def test_processes_write_one_checkpoint_and_go_on_together(tmp_path: Path) -> None:
    dense = save_dense("llama", tmp_path / "dense")
    together(2, work, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert first == second and first["found"] == 1
    for method, name, tolerance in ((MoDeGPTPlus(), "plus", 0.0), (PAPER, "paper", 1e-5)):
        expected = method.compress(task_on(load_model(str(dense), device="cpu"))).model.state_dict()
        ours = load_model(str(first[name]), device="cpu").state_dict()
        assert ours.keys() == expected.keys()
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
