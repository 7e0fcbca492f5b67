"""ASVD: channels weigh as much as their inputs say."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modegpt.calibration.cache import StatisticsCache
from modegpt.errors import UserError
from modegpt.methods import asvd
from modegpt.methods.asvd import (
    ASVD,
    _loss_with,
    channel_scale,
    ranks_by_loss,
    scaled_truncation,
    truncated_losses,
)
from modegpt.methods.base import CompressionTask
from modegpt.methods.low_rank import block_linears, rank_keeping, truncated
from modegpt.models import decoder_layers
from tests.methods.protocol_checks import (
    FORMS,
    check_compression,
    check_saved_and_generating,
    check_what_decides,
    check_zero_sparsity,
    linear_errors,
)
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model


def linears(task: CompressionTask, layer: nn.Module) -> dict[str, nn.Linear]:
    return block_linears(task.family, layer)


def inputs(channels: int = 10, num_rows: int = 200) -> torch.Tensor:
    return torch.randn(num_rows, channels, dtype=torch.float64) * torch.logspace(-1, 1, channels, dtype=torch.float64)


def test_scale_is_the_power_of_the_root_mean_square():
    X = inputs()
    s = channel_scale(X.T @ X, alpha=0.5)
    expected = X.square().mean(dim=0).sqrt() ** 0.5
    torch.testing.assert_close(s / s[0], expected / expected[0], rtol=1e-12, atol=0)


def test_factors_are_the_truncation_of_the_scaled_weight():
    X, W = inputs(), torch.randn(10, 8, dtype=torch.float64)
    s = channel_scale(X.T @ X, alpha=0.5)
    U, S, Vh = torch.linalg.svd(s[:, None] * W, full_matrices=False)
    result = scaled_truncation(W, s, rank=3)
    torch.testing.assert_close(result.factors.A @ result.factors.B, ((U[:, :3] * S[:3]) @ Vh[:3]) / s[:, None])
    assert result.relative_error == pytest.approx((S[3:].square().sum() / S.square().sum()).item(), rel=1e-10)


def test_without_activations_in_the_scale_it_is_plain_svd():
    X, W = inputs(), torch.randn(10, 8, dtype=torch.float64)
    scaled = scaled_truncation(W, channel_scale(X.T @ X, alpha=0.0), rank=3).factors
    plain = truncated(W, 3).factors
    torch.testing.assert_close(scaled.A @ scaled.B, plain.A @ plain.B)


def test_full_weight_of_activations_is_optimal_for_uncorrelated_inputs():
    X = inputs(num_rows=20000)
    C = torch.diag((X.T @ X).diagonal())
    W = torch.randn(10, 8, dtype=torch.float64)

    def loss(alpha: float) -> float:
        factors = scaled_truncation(W, channel_scale(C, alpha), rank=3).factors
        E = W - factors.A @ factors.B
        return (E * (C @ E)).sum().item()

    assert loss(1.0) < loss(0.5) < loss(0.0)


def test_a_dead_channel_is_survived():
    X, W = inputs(), torch.randn(10, 8, dtype=torch.float64)
    X[:, 4] = 0
    for s in (channel_scale(X.T @ X, alpha=1.0), channel_scale(torch.zeros(10, 10), alpha=0.5)):
        assert torch.isfinite(scaled_truncation(W, s, rank=5).factors.A).all()


def test_options_are_checked():
    with pytest.raises(UserError, match=r"alpha=1\.5"):
        ASVD(alpha=1.5)
    with pytest.raises(UserError, match="search_windows=0 must be at least 1"):
        ASVD(search_windows=0)


@pytest.mark.parametrize("form", FORMS)
def test_protocol(form: str):
    check_zero_sparsity(ASVD(), form)
    scaled = linear_errors(lambda C: C.diagonal().sqrt().diag())
    check_compression(ASVD(rank_search=False), form, 0.4, tolerance=0.01, errors=scaled)


@pytest.mark.parametrize("form", ["llama", "opt"])
def test_searched_ranks_meet_the_budget(form: str):
    task = task_of(dense_model(form), 0.3)
    sizes = [linear.weight.shape for layer in decoder_layers(task.model) for linear in linears(task, layer).values()]
    largest, total = max(map(sum, sizes)), sum(map(math.prod, sizes))
    check_compression(ASVD(), form, 0.3, tolerance=largest / total)
    check_compression(ASVD(), form, 0.95, tolerance=0.1)


@pytest.mark.parametrize("form", ["llama", "opt", "gemma3_text"])
def test_losses_are_those_of_the_whole_model_with_one_map_truncated(form: str):
    task = task_of(dense_model(form), 0.3, num_samples=5, sequence_length=12)
    calibration, layers = task.calibration, decoder_layers(task.model)
    scales = ASVD()._scales(task)
    shares, ids = (0.2, 0.7), calibration.tokens.ids[:3]
    losses = truncated_losses(calibration, scales, shares, num_windows=3)
    assert [tuple(of_layer.shape) for of_layer in losses] == [(len(of_layer), 2) for of_layer in scales]
    assert len(losses) == len(layers)
    for index, role, place in ((0, "query", 0), (1, "down", 1), (len(layers) - 1, "output", 0)):
        model = copy.deepcopy(task.model)
        linear = linears(task, decoder_layers(model)[index])[role]
        rank = rank_keeping(shares[place], linear.weight.shape)
        factors = scaled_truncation(linear.weight.T.detach(), scales[index][role], rank).factors
        linear.weight.data = (factors.A @ factors.B).T
        with torch.no_grad():
            expected = model(ids, labels=ids).loss.item()
        assert losses[index][list(scales[index]).index(role), place].item() == pytest.approx(expected, rel=1e-5)


def test_ranks_by_loss_on_a_case_worked_by_hand():
    """Maps of 10 x 10 at 0.4 and 0.8 of their weights: ranks 2 and 4. Half of 300 must go."""
    a, b, c = (0, "query"), (0, "up"), (1, "up")
    losses = {(a, 2): 5.0, (a, 4): 1.0, (b, 2): 2.0, (b, 4): 2.5, (c, 2): 9.0, (c, 4): 3.0}
    sizes = dict.fromkeys((a, b, c), (10, 10))
    # a loses 20, b 60, c 20, and a 40 more of which 50 are needed in all: 140 of 150, so c goes to rank 2 as well
    assert ranks_by_loss(sizes, losses, 0.5) == {a: 2, b: 2, c: 3}
    # only a and b: 80 removed of 75; nothing is left for a whole rank of 20
    assert ranks_by_loss(sizes, losses, 0.25) == {a: 4, b: 2}
    # 60 are needed, 80 would go: b gets a rank back
    assert ranks_by_loss(sizes, losses, 0.2) == {a: 4, b: 3}


def test_passes_of_the_search_are_counted_as_shares_of_the_windows_and_layers() -> None:
    task = task_of(dense_model("llama"), 0.3, num_samples=6, sequence_length=6)
    scales, meter = ASVD()._scales(task), task.calibration.meter
    before = meter.forward_passes
    truncated_losses(task.calibration, scales, (0.5,), num_windows=2)
    layers = len(scales)
    run = layers - 1 + sum((layers - index) * len(of_layer) for index, of_layer in enumerate(scales))
    assert meter.forward_passes - before == pytest.approx(run / layers / 3)


def test_one_search_serves_every_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def noted(*arguments: Any, **options: Any) -> list[torch.Tensor]:
        measured.append(options)
        return truncated_losses(*arguments, **options)

    monkeypatch.setattr(asvd, "truncated_losses", noted)

    def ranks(method: ASVD, sparsity: float, root: Path | None) -> list[dict[str, int]]:
        task = task_of(dense_model("llama"), sparsity)
        if root is not None:
            task.calibration.cache = StatisticsCache(root=root, key="k", max_bytes=10**8)
        return [layer["ranks"] for layer in method.compress(task).layers]

    ranks(ASVD(), 0.2, tmp_path)
    kept = ranks(ASVD(), 0.4, tmp_path)
    assert len(measured) == 1
    assert kept == ranks(ASVD(), 0.4, None)
    for other in (ASVD(alpha=1.0), ASVD(search_windows=2)):
        ranks(other, 0.4, tmp_path)
    ranks(ASVD(), 0.95, tmp_path)
    assert len(measured) == 5


def test_the_calibration_text_decides() -> None:
    check_what_decides(ASVD(), "llama")


@pytest.mark.parametrize("rank_search", [True, False])
def test_saved_and_generating(rank_search: bool, tmp_path):
    check_saved_and_generating(ASVD(rank_search=rank_search), "qwen3", 0.4, tmp_path)


def test_a_truncation_whose_states_overflow_is_the_worst_there_is() -> None:
    task = task_of(dense_model("llama"), 0.3)
    prefix = task.calibration.embed()
    layer = decoder_layers(task.model)[2]
    weight = torch.full_like(task.family.down(layer).weight, float("inf"))
    ids = task.calibration.tokens.ids
    with torch.no_grad():
        assert _loss_with(task.model, ids, prefix, 2, {f"{task.family.down_path}.weight": weight}) == math.inf
        assert 0 < _loss_with(task.model, ids, prefix, 2, {}) < math.inf
