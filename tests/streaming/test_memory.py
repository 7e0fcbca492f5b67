"""The predicted peak of memory against the measured one, and the refusal that says what would fit."""

from multiprocessing.queues import Queue
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modegpt.allocation.policies import Uniform
from modegpt.calibration.calibration import Calibration
from modegpt.calibration.statistics import STATISTICS
from modegpt.cost.metering import peak_memory_bytes
from modegpt.data.tokens import CalibrationTokens
from modegpt.decompositions import MLP_VARIANTS, MLPNystrom, QueryKeyCR, ValueOutputSVD
from modegpt.decompositions.modules import MLPWeights, Sizes, Variant
from modegpt.errors import UserError
from modegpt.methods.base import CompressionTask
from modegpt.methods.modegpt import MoDeGPT
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.models import read_value_output
from modegpt.progress import Progress
from modegpt.streaming import memory
from modegpt.streaming.compress import StreamedCompression
from modegpt.streaming.hidden import DiskStorage
from modegpt.streaming.memory import FLOAT64, Prediction, check_fits, plus_bytes, predict, resident_bytes
from modegpt.streaming.model import StreamedModel
from modegpt.streaming.workspace import Workspace
from tests.models.family_table import CONFIGS, statistics_of
from tests.processes import CLEAN, STUCK_SECONDS
from tests.streaming.streamed_task import save_dense, task_on

CLEAR = Path("/proc/self/clear_refs")
NOT_SCORED = SimpleNamespace(text=None)
SIZES = Sizes(d_h=32, n=40, H=4, H_kv=2, d=8)
linux = pytest.mark.skipif(not CLEAR.exists(), reason="resets the peak of memory through /proc")


def paper() -> MoDeGPT:
    return MoDeGPT(mlp=MLPNystrom(), query_key=QueryKeyCR(), value_output=ValueOutputSVD(), allocation=Uniform())


def measure(name: str, n: int, d_h: int, rank: int, results: Queue) -> None:
    """In a process of its own: the bytes that MLP variant ``name`` adds at its fullest."""
    X = torch.randn(n + 200, n, dtype=torch.float64)
    statistics = {"mlp.C": X.mT @ X, "mlp.mean": X.mean(0), "layer.num_tokens": torch.tensor(n + 200)}
    weights = MLPWeights(
        W_U=torch.randn(d_h, n), W_G=torch.randn(d_h, n), W_D=torch.randn(n, d_h), b_U=None, b_G=None, b_D=None
    )
    variant = mlp_variant(name)
    before = resident_bytes()
    CLEAR.write_text("5")
    variant(weights, statistics, rank, torch.Generator().manual_seed(0))
    results.put(peak_memory_bytes()["host"] - before)


def mlp_variant(name: str) -> Variant:
    return MLP_VARIANTS[name](**({"block": 256} if name == "elimination" else {}))


@linux
@pytest.mark.parametrize("name", MLP_VARIANTS)
def test_what_an_mlp_decomposition_holds_is_known(name: str) -> None:
    """n x n matrices of 32 MiB, which the allocator gives back at once; at most what is predicted, at least half."""
    n, d_h, rank = 2048, 256, 1434
    predicted = FLOAT64 * mlp_variant(name).solver_elements(Sizes(d_h=d_h, n=n, H=4, H_kv=4, d=64), rank)
    results = CLEAN.Queue()
    process = CLEAN.Process(target=measure, args=(name, n, d_h, rank, results))
    process.start()
    measured = results.get(timeout=STUCK_SECONDS)
    process.join()
    assert 0.5 * predicted < measured < 1.05 * predicted + 2**24, (name, measured / 2**20, predicted / 2**20)


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3", "olmo2"])
def test_statistics_have_the_sizes_that_are_counted(name: str, tmp_path: Path) -> None:
    streamed = StreamedModel.open(str(save_dense(name, tmp_path / "dense")))
    task = task_on(streamed.model)
    hidden = DiskStorage(streamed.model, streamed).embed(task.calibration.tokens.ids, batch_size=3)
    with streamed.layer(0) as layer:
        names = statistics_of(task.family)
        statistics = task.calibration.observe(hidden, 0, names)
        W_V = read_value_output(task.family, layer).W_V
    joint = task.family.joint_norms
    sizes = Sizes(d_h=32, n=read_width(name), H=4, H_kv=len(W_V), d=W_V.shape[2], joint_norms=joint)
    assert {key: value.numel() for key, value in statistics.items()} == {
        key: STATISTICS[key].num_elements(sizes) for key in names
    }


def read_width(name: str) -> int:
    return CONFIGS[name].ffn_dim if name == "opt" else CONFIGS[name].intermediate_size


def test_the_prediction_counts_what_grows(tmp_path: Path) -> None:
    streamed = StreamedModel.open(str(save_dense("llama", tmp_path / "dense", torch.bfloat16)))
    task = task_on(streamed.model)
    host = predict(paper(), task, streamed, NOT_SCORED, on_disk=False).host
    assert host["statistics"] == FLOAT64 * (40**2 + (4 + 2 + 2) * 8**2)
    assert host["hidden states"] == 2 * 32 * (8 * 20 + 3 * 20)
    assert predict(paper(), task, streamed, NOT_SCORED, on_disk=True).host["hidden states"] < host["hidden states"]
    streamed.device = torch.device("cuda")
    elsewhere = predict(paper(), task, streamed, NOT_SCORED, on_disk=False)
    assert (
        elsewhere.device == {part: size for part, size in host.items() if part != "process"}
        and elsewhere.host_bytes < elsewhere.host["process"] + 2**20
    )


def compress_plus(dense: Path, on_disk: bool, results: Queue) -> None:
    """In a process of its own: the bytes that plus adds at its fullest, and those that were predicted."""
    streamed = StreamedModel.open(str(dense))
    ids = torch.randint(0, streamed.model.config.vocab_size, (16, 128), generator=torch.Generator().manual_seed(0))
    tokens = CalibrationTokens(ids=ids, sha256="", stream_tokens=ids.numel())
    task = CompressionTask(Calibration(streamed.model, tokens, batch_size=4, progress=Progress(quiet=True)), 0.3)
    before = resident_bytes()
    CLEAR.write_text("5")
    predicted = predict(MoDeGPTPlus(), task, streamed, NOT_SCORED, on_disk=on_disk).host
    workspace = Workspace(dense / "streamed", "0" * 12, {})
    StreamedCompression(MoDeGPTPlus(), task, streamed, workspace, on_disk=on_disk).run()
    added = sum(predicted.values()) - predicted["process"]
    results.put((peak_memory_bytes()["host"] - before, added, predicted["margin"]))


@linux
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_plus_holds_is_known(on_disk: bool, tmp_path: Path) -> None:
    """At most what is predicted, and at least a third of it but for the margin: 25 MiB of sums, 64 MiB of a solver."""
    config = LlamaConfig(
        hidden_size=128, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    results = CLEAN.Queue()
    process = CLEAN.Process(target=compress_plus, args=(tmp_path, on_disk, results))
    process.start()
    measured, predicted, margin = results.get(timeout=STUCK_SECONDS)
    process.join()
    assert (predicted - margin) / 3 < measured < predicted, (measured / 2**20, predicted / 2**20)


def test_disk_holds_what_plus_would(tmp_path: Path) -> None:
    streamed = StreamedModel.open(str(save_dense("llama", tmp_path / "dense")))
    task = task_on(streamed.model)
    memory, disk = (plus_bytes(MoDeGPTPlus(), task, SIZES, on_disk=on_disk) for on_disk in (False, True))
    assert disk["streams"] < memory["streams"]
    assert all(disk[name] == memory[name] for name in memory.keys() - {"streams"})
    assert memory["sums"] == 2 * FLOAT64 * 41 * (41 + 32), "fit and held out; a constant beside the channels"


def test_an_allocation_by_influence_may_leave_a_layer_whole() -> None:
    sizes = Sizes(d_h=64, n=400, H=4, H_kv=4, d=16)
    whole, reduced = (MLPNystrom().solver_elements(sizes, rank) for rank in (400, 280))
    assert whole == 6 * 400**2 + 2 * 400 * 64 > reduced >= 4 * 400**2


def test_what_does_not_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    streamed = StreamedModel.open(str(save_dense("llama", tmp_path / "dense")))
    task = task_on(streamed.model)

    def refusal(states: int, solver: int, limit: int, *, on_disk: bool = False) -> str:
        prediction = Prediction(host={"process": 100, "hidden states": states, "solver": solver}, device={})
        with pytest.raises(UserError) as error:
            check_fits(prediction, task, streamed, on_disk=on_disk, max_host_bytes=limit)
        return str(error.value)

    assert "calibration.num_samples=4 would fit, or out_of_core.hidden_states=disk" in refusal(1000, 100, 700)
    assert "no number of samples would fit" in refusal(1000, 1000, 700)
    assert "calibration.num_samples" not in refusal(1000, 100, 700, on_disk=True)
    assert check_fits(
        Prediction(host={"process": 100}, device={}), task, streamed, on_disk=False, max_host_bytes=101
    ) == {"host": 101}


def test_a_control_group_limits_what_is_available(tmp_path: Path) -> None:
    membership, group = tmp_path / "cgroup", tmp_path / "fs" / "jobs" / "mine"
    group.mkdir(parents=True)
    membership.write_text("0::/jobs/mine\n")
    for name, text in {"memory.max": "max", "memory.current": "5", "memory.stat": "anon 1\ninactive_file 0\n"}.items():
        (group / name).write_text(text)
    for name, text in {
        "memory.max": "1000",
        "memory.current": "700",
        "memory.stat": "anon 1\ninactive_file 150\n",
    }.items():
        (group.parent / name).write_text(text)
    assert memory._group_limits(tmp_path / "fs", membership) == [450]
    assert memory._group_limits(tmp_path / "fs", tmp_path / "absent") == []
    assert memory.available_host_bytes() > 0
