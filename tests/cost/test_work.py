"""FLOPs by formula against the run-time counter, and what the counter sees against textbook counts."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modegpt.calibration.moments import SecondMoment
from modegpt.calibration.stream import advance, embed
from modegpt.cost.metering import CostMeter, Stage
from modegpt.cost.work import Alike, WorkCounter, forward, forward_cost, metered_forwards
from modegpt.methods.llm_pruner import LLMPruner
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.methods.sleb import SLEB
from modegpt.models import decoder_layers
from tests.methods.task_of import task_of
from tests.models.family_table import CONFIGS, dense_model


def counted(run) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_flops_are_pytorchs(name: str) -> None:
    """PyTorch counts the whole square of attention where the formula counts the causal half."""
    model = dense_model(name)
    model.set_attn_implementation("eager")
    ids = torch.randint(3, model.config.vocab_size, (3, 12))
    stage = Stage("here")
    with metered_forwards(model, stage.add):
        theirs = counted(lambda: model(input_ids=ids, use_cache=False))
    cost = forward_cost(model)
    causal_half = cost.attention_columns * 3 * 12**2
    angles = [len(buffer) for path, buffer in model.named_buffers() if path.endswith("inv_freq")]
    rotary = 2 * 12 * sum(angles)  # one small product a batch
    around = sum(
        2 * ids.numel() * module.weight.numel()
        for path, module in model.named_modules()
        if path.endswith(("project_in", "project_out"))
    )  # OPT's, outside its layers
    assert stage.flops + causal_half + around == pytest.approx(theirs, abs=3 * rotary)
    assert stage.work == {"forward float32": stage.flops}
    assert stage.bytes > 4 * cost.num_weights


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula_and_the_counter_agree_to_the_flop(name: str) -> None:
    """In the layers alone: what scoring counts by formula is what compression counts by watching."""
    model, seen, watched = dense_model(name), Stage("here"), Stage("there")
    hidden = embed(model, torch.randint(3, model.config.vocab_size, (3, 12)), batch_size=2)
    cost = forward_cost(model)
    with WorkCounter(watched.add):
        for index, layer in enumerate(decoder_layers(model)):
            advance(hidden, index, layer)
    for windows in (2, 1):
        seen.add("forward", cost.dtype, flops=cost.flops(windows, 12))
    assert watched.work == seen.work


def test_of_forwards_that_are_alike_one_is_watched_and_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two shapes: as many calls are looked at as for one batch of each, and the account is the same."""
    names, looks = frozenset({"mlp.C", "query_key.C_Q", "layer.influence"}), []
    look = WorkCounter.__torch_function__

    def noted(counter: WorkCounter, func: Any, *rest: Any) -> Any:
        looks.append(func)
        return look(counter, func, *rest)

    monkeypatch.setattr(WorkCounter, "__torch_function__", noted)

    def account(num_windows: int) -> tuple[dict[str, float], float, int]:
        looks.clear()
        calibration = task_of(dense_model("llama"), 0.0, num_samples=num_windows).calibration
        list(calibration.statistics(names))
        stage = calibration.meter.stages["statistics"]
        return stage.work, stage.bytes, looks.count(torch.nn.functional.linear)

    work, num_bytes, watched = account(7)
    (three, three_bytes, once), (one, one_bytes, _) = account(3), account(1)
    assert work == {kind: 2 * three[kind] + one[kind] for kind in work}
    assert num_bytes == 2 * three_bytes + one_bytes
    assert watched == 2 * once


@pytest.mark.parametrize("method", [MoDeGPTPlus, SLEB, LLMPruner])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_methods_count_as_if_every_forward_were_watched(monkeypatch: pytest.MonkeyPatch, name: str, method) -> None:
    accounts = []
    for watch_all in (False, True):
        if watch_all:
            monkeypatch.setattr(Alike, "forward", lambda self, shape: forward())
        task = task_of(dense_model(name), 0.3)
        method().compress(task)
        stages = task.calibration.meter.stages.values()
        accounts.append([(stage.name, stage.work, stage.bytes) for stage in stages])
    assert accounts[0] == accounts[1]
    assert sum(stage.flops for stage in stages) > 0


@pytest.mark.parametrize("bias", [None, torch.ones(5)])
@pytest.mark.parametrize(
    "x",
    [torch.ones(4, 3), torch.ones(2, 4, 3), torch.ones(2, 3, 4).mT, torch.ones(0, 3), torch.ones(3)],
    ids=["matrix", "batch", "transposed", "empty", "vector"],
)
def test_linear_maps_count_as_the_products_inside(x: torch.Tensor, bias: torch.Tensor | None) -> None:
    """They are counted from outside, and nothing else sees more."""
    W, outside, inside = torch.ones(5, 3), Stage("outside"), Stage("inside")
    with WorkCounter(outside.add):
        torch.nn.functional.linear(x, W, bias)
    with WorkCounter(inside.add).operations:
        torch.nn.functional.linear(x, W, bias)
    assert outside.work == inside.work
    if x.is_contiguous():
        assert outside.bytes == inside.bytes


def test_gram_products_are_counted_apart_and_as_far_as_they_are_formed() -> None:
    rows, stage = torch.randn(64, 3, 10), Stage("here")
    moment = SecondMoment.zeros(3, 10)
    with WorkCounter(stage.add), forward():
        moment.update(rows)
        rows[:, 0] @ torch.ones(10, 2)
    assert stage.work == {"gram float64": 2 * 64 * 3 * 10**2, "forward float32": 2 * 64 * 10 * 2}
    wide, stage = SecondMoment.zeros(1, 2000), Stage("here")
    with WorkCounter(stage.add):
        wide.update(torch.randn(8, 1, 2000))
    assert stage.work.keys() == {"gram float64"} and 0.5 < stage.flops / (2 * 8 * 2000**2) < 0.65


def test_backward_passes_and_products_in_place_are_counted() -> None:
    x, W, stage = torch.ones(7, 4), torch.ones(4, 5, requires_grad=True), Stage("here")
    with WorkCounter(stage.add):
        with forward():
            loss = (x @ W).sum()
        torch.autograd.grad(loss, [W])
    assert stage.work == {"forward float32": 2 * 7 * 4 * 5, "product float32": 2 * 7 * 4 * 5}
    with WorkCounter(stage.add):
        torch.zeros(4, 4).addmm_(torch.ones(4, 3), torch.ones(3, 4))
    assert stage.flops == 2 * 2 * 7 * 4 * 5 + 2 * 4 * 3 * 4


def test_attention_is_counted_by_its_causal_half_forward_and_backward() -> None:
    q, k, v = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))
    forwards, backwards = Stage("forward"), Stage("backward")
    with WorkCounter(forwards.add):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    with WorkCounter(backwards.add):
        torch.autograd.grad(out.sum(), [q, k, v])
    product = 2 * 4 * 6 * 6 * 8  # the half of 2 b h l l d
    assert forwards.flops == 2 * product and backwards.flops == 5 * product


def test_heads_that_several_queries_share_count_as_repeated() -> None:
    q, k, v = (torch.randn(2, heads, 6, 8) for heads in (4, 2, 2))
    stage = Stage("forward")
    with WorkCounter(stage.add):
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert stage.flops == 2 * (2 * 4 * 6 * 6 * 8)


@pytest.mark.parametrize(
    ("operation", "flops"),
    [
        (lambda C, B: torch.linalg.cholesky_ex(C), 2 * 12**3 / 3),
        (lambda C, B: torch.cholesky_solve(B, C), 2 * 2 * 12**2 * 5),
        (lambda C, B: torch.linalg.solve_triangular(C, B, upper=False), 2 * 12**2 * 5),
        (lambda C, B: torch.linalg.solve(C, B), 2 * (2 * 12**3 / 3 + 2 * 12**2 * 5)),
        (lambda C, B: torch.cholesky_inverse(C), 2 * 2 * 12**3 / 3),
        (lambda C, B: torch.linalg.eigh(C), 2 * 9 * 12**3),
        (lambda C, B: torch.linalg.svd(C), 2 * 20 * 12**3),
    ],
)
def test_factorisations_are_counted_apart(operation, flops: float) -> None:
    C = torch.eye(12, dtype=torch.float64).repeat(2, 1, 1)
    B = torch.ones(2, 12, 5, dtype=torch.float64)
    stage = Stage("here")
    with WorkCounter(stage.add):
        operation(C, B)
        C @ B
    assert stage.work["factorisation float64"] == pytest.approx(flops)
    assert stage.work["product float64"] == 2 * 2 * 12 * 12 * 5
    assert stage.bytes >= C.nbytes + B.nbytes


def test_views_move_no_bytes() -> None:
    stage = Stage("here")
    X = torch.ones(4, 6)
    with WorkCounter(stage.add):
        X.T[:2].unsqueeze(0)
    assert stage.bytes == stage.flops == 0


def test_a_counted_stage_and_statistics_fill_the_account() -> None:
    meter = CostMeter()
    with meter.stage("compression"), meter.stage("inside", counted=True):
        torch.ones(3, 4) @ torch.ones(4, 5)
    assert meter.stages["inside"].flops == 2 * 3 * 4 * 5 and meter.stages["inside"].within == "compression"
    with meter.stage("outside", counted=True):
        with meter.stage("inner", counted=True):
            torch.ones(3, 4) @ torch.ones(4, 5)
        torch.ones(3, 4) @ torch.ones(4, 2)
    assert (meter.stages["inner"].flops, meter.stages["outside"].flops) == (2 * 3 * 4 * 5, 2 * 3 * 4 * 2)
    calibration = task_of(dense_model("llama"), 0.0).calibration
    list(calibration.statistics(frozenset({"mlp.C"})))
    stage = calibration.meter.stages["statistics"]
    batches = calibration.tokens.ids.split(calibration.batch_size)
    assert stage.work["forward float32"] == pytest.approx(
        sum(forward_cost(calibration.model).flops(*batch.shape) for batch in batches)
    )
    assert (
        stage.work["gram float64"]
        == calibration.num_layers * 2 * calibration.tokens.num_tokens * calibration.model.config.intermediate_size**2
    )
    assert stage.flops == pytest.approx(sum(stage.work.values()))
