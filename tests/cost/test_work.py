"""FLOPs by formula against PyTorch's own counter, and of what the counter sees against textbook counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modegpt.calibration.calibration import gram_flops, layer_flops
from modegpt.calibration.moments import SecondMoment
from modegpt.cost.metering import CostMeter, Stage
from modegpt.cost.work import WorkCounter, forward_cost, metered_forwards
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
    rotary = (
        2 * 12 * (model.config.head_dim // 2) if hasattr(model.config, "head_dim") else 0
    )  # angles: one small product a batch
    around = sum(
        2 * ids.numel() * module.weight.numel()
        for path, module in model.named_modules()
        if path.endswith(("project_in", "project_out"))
    )  # OPT's, outside its layers
    assert stage.flops + causal_half + around == pytest.approx(theirs, abs=3 * rotary)
    assert stage.work == {"forward float32": stage.flops}
    assert layer_flops(model, ids) * len(decoder_layers(model)) == pytest.approx(cost.flops(3, 12))
    assert stage.bytes > 4 * cost.num_weights


def test_gram_flops_count_each_product_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(64, 3, 10)
    moment = SecondMoment.zeros(3, 10)
    theirs = counted(lambda: moment.update(rows))
    assert gram_flops({"G": moment.value, "mean": torch.zeros(10)}, 64) == theirs


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
