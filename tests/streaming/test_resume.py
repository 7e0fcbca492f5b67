"""Killed with -9 at any moment and started again: the same checkpoint to the bit, and no layer done twice."""

import signal
from pathlib import Path

import pytest
import torch

import modegpt.streaming.workspace as workspace_module
from modegpt.allocation.policies import Entropic
from modegpt.calibration.calibration import Calibration
from modegpt.decompositions import MLPRandom, QueryKeyCR, ValueOutputSVD
from modegpt.errors import UserError
from modegpt.methods.base import LayerByLayer
from modegpt.methods.divergence import Departures
from modegpt.methods.modegpt import MoDeGPT
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.methods.plus.sequential import LayerPass
from modegpt.streaming.compress import StreamedCompression
from modegpt.streaming.shards import Shards
from modegpt.streaming.workspace import POSITION, Position, Workspace
from tests.processes import CLEAN, killed_when
from tests.streaming.streamed_task import compress_out_of_core, save_dense

METHOD = MoDeGPT(mlp=MLPRandom(), query_key=QueryKeyCR(), value_output=ValueOutputSVD(), allocation=Entropic())
"""The random choice shows whether the generator goes on where it was."""


MOMENTS = {
    "in the influence walk": (
        0,
        lambda: killed_when(Calibration, "observe", lambda self, hidden, index, names, **_: index == 1, after=True),
    ),
    "before the first layer": (
        0,
        lambda: killed_when(Workspace, "save", lambda self, position, hidden: position.next_layer == 0, after=True),
    ),
    "inside a layer": (
        1,
        lambda: killed_when(
            Calibration, "observe", lambda self, hidden, index, names, **_: index == 1 and len(names) > 1, after=True
        ),
    ),
    "before a layer is written": (
        1,
        lambda: killed_when(Workspace, "write", lambda self, tensors, *, shard, num_shards: shard == 2, after=False),
    ),
    "with a layer written and no position": (
        1,
        lambda: killed_when(Workspace, "save", lambda self, position, hidden: position.next_layer == 2, after=False),
    ),
    "with hidden states written and no position": (
        1,
        lambda: killed_when(
            workspace_module,
            "write_text",
            lambda path, text: path.name == POSITION and '"next_layer": 2' in text,
            after=False,
        ),
    ),
    "between layers": (
        2,
        lambda: killed_when(Workspace, "save", lambda self, position, hidden: position.next_layer == 2, after=True),
    ),
    "after the last layer": (
        3,
        lambda: killed_when(Workspace, "save", lambda self, position, hidden: position.next_layer == 3, after=True),
    ),
    "with the checkpoint complete": (
        3,
        lambda: killed_when(StreamedCompression, "complete", lambda *_: True, after=True),
    ),
}
"""Where a process dies, and how many of the three layers are finished then."""


PLUS = MoDeGPTPlus()
PLUS_MOMENTS = {
    "in the allocation": (
        0,
        lambda: killed_when(Departures, "advance", lambda self, index, *_: index == 1, after=True),
    ),
    "inside a layer": (
        1,
        lambda: killed_when(LayerPass, "_reduce_mlp", lambda self, *_: self.index == 1, after=True),
    ),
    "between layers": MOMENTS["between layers"],
    "after the last layer": MOMENTS["after the last layer"],
}


def die(method: LayerByLayer, moment: str, dense: Path, destination: Path, on_disk: bool) -> None:
    _, prepare = (PLUS_MOMENTS if method == PLUS else MOMENTS)[moment]
    prepare()
    compress_out_of_core(method, dense, destination, on_disk=on_disk)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense("llama", tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def expected(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress_out_of_core(METHOD, dense, tmp_path_factory.mktemp("uninterrupted") / "model")[1]


@pytest.fixture(scope="module")
def expected_plus(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress_out_of_core(PLUS, dense, tmp_path_factory.mktemp("uninterrupted") / "plus")[1]


@pytest.mark.parametrize(
    "moment, on_disk",
    [(moment, False) for moment in MOMENTS]
    + [(moment, True) for moment in ("in the influence walk", "inside a layer", "between layers")],
)
def test_a_killed_run_goes_on_from_the_last_finished_layer(
    moment: str, on_disk: bool, dense: Path, expected: Path, tmp_path: Path
) -> None:
    check_resumed(METHOD, moment, MOMENTS[moment][0], on_disk, dense, expected, tmp_path / "model")


@pytest.mark.parametrize("moment, on_disk", [(moment, on_disk) for moment in PLUS_MOMENTS for on_disk in (False, True)])
def test_plus_killed_goes_on_with_all_its_streams(
    moment: str, on_disk: bool, dense: Path, expected_plus: Path, tmp_path: Path
) -> None:
    check_resumed(PLUS, moment, PLUS_MOMENTS[moment][0], on_disk, dense, expected_plus, tmp_path / "model")


def check_resumed(
    method: LayerByLayer, moment: str, finished: int, on_disk: bool, dense: Path, expected: Path, destination: Path
) -> None:
    process = CLEAN.Process(target=die, args=(method, moment, dense, destination, on_disk))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    _, checkpoint, found = compress_out_of_core(method, dense, destination, on_disk=on_disk)
    assert found == finished
    ours, theirs = Shards(checkpoint), Shards(expected)
    assert ours.files == theirs.files
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in theirs.files)
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted(path.name for path in expected.iterdir())
    left = {path.relative_to(checkpoint.parent).as_posix() for path in checkpoint.parent.glob("hidden/*/*")}
    # the temperature, too, is found again where the process ends before the checkpoint is in its place
    compared = {"hidden/00003/compared_dense", "hidden/00003/compared_compressed"}
    assert left == (compared if method == PLUS else set())


def test_settings_never_mix(tmp_path: Path) -> None:
    mine = Workspace(tmp_path / "model", "a" * 64, {"sparsity": 0.3})
    mine.save(Position(next_layer=2), {})
    with pytest.raises(UserError, match="another process"):
        Workspace(tmp_path / "model", "a" * 64, {"sparsity": 0.3})
    other = Workspace(tmp_path / "model", "b" * 64, {"sparsity": 0.4})
    assert other.position() is None and other.others() == [mine.directory]
    mine._lock.close()
    with pytest.raises(UserError, match="other settings"):
        Workspace(tmp_path / "model", "a" * 64, {"sparsity": 0.4})
    again = Workspace(tmp_path / "model", "a" * 64, {"sparsity": 0.3})
    assert again.position() == Position(next_layer=2)
    again.remove()
    assert not mine.directory.exists() and other.directory.exists()
