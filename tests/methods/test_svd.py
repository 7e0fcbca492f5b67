"""Plain SVD: the best low-rank weights, and ranks that spend the budget."""

import pytest
import torch

from modegpt.methods.low_rank import block_linears, factor_ranks, truncated
from modegpt.methods.svd import SVD
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


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.5, 0.8])
def test_ranks_spend_the_budget_and_no_more(sparsity: float):
    sizes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 172), (64, 172), (172, 64)] * 5
    ranks = factor_ranks(sizes, sparsity)
    stored = sum(rank * (rows + columns) for rank, (rows, columns) in zip(ranks, sizes, strict=True))
    budget = (1 - sparsity) * sum(rows * columns for rows, columns in sizes)
    assert budget - sum(rows + columns for rows, columns in set(sizes)) < stored <= budget + 1e-6
    for size in set(sizes):
        of_size = [rank for rank, other in zip(ranks, sizes, strict=True) if other == size]
        assert max(of_size) - min(of_size) <= 1


@pytest.mark.parametrize(("rows", "columns"), [(12, 7), (7, 12), (9, 9)])
def test_error_is_the_dropped_energy_and_no_factors_do_better(rows: int, columns: int):
    W = torch.randn(rows, columns, dtype=torch.float64)
    result = truncated(W, 4)
    error = (W - result.factors.A @ result.factors.B).square().sum()
    S = torch.linalg.svdvals(W)
    assert error.item() == pytest.approx(S[4:].square().sum().item(), rel=1e-10)
    assert result.relative_error == pytest.approx((error / W.square().sum()).item(), rel=1e-10)
    for _ in range(20):  # alternating least squares from anywhere ends no lower
        A = torch.randn(rows, 4, dtype=torch.float64)
        for _ in range(3):
            B = torch.linalg.lstsq(A, W).solution
            A = torch.linalg.lstsq(B.T, W.T).solution.T
        assert (W - A @ B).square().sum() >= error - 1e-10


def test_every_linear_of_the_model_is_its_own_truncation():
    model = dense_model("llama-multihead-biased")
    task = task_of(model, 0.4)
    compressed = SVD().compress(task)
    for dense, layer, report in zip(
        decoder_layers(model), decoder_layers(compressed.model), compressed.layers, strict=True
    ):
        for role, linear in block_linears(task.family, dense).items():
            factored = getattr(task.family, role)(layer)
            U, S, Vh = torch.linalg.svd(linear.weight.double(), full_matrices=False)
            rank = report["ranks"][role]
            best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
            torch.testing.assert_close(factored.B.weight @ factored.A.weight, best.float(), rtol=1e-4, atol=1e-5)
            assert torch.equal(factored.B.bias, linear.bias)
    assert task.calibration.meter.forward_passes == 0 and task.calibration.meter.calibration_tokens == 0


@pytest.mark.parametrize("form", FORMS)
def test_protocol(form: str):
    check_zero_sparsity(SVD(), form)
    plain = linear_errors(lambda C: torch.eye(len(C)).double())
    compressed = check_compression(SVD(), form, 0.4, tolerance=0.01, errors=plain)
    assert set(compressed.layers[0]["relative_error"]) == set(compressed.layers[0]["ranks"])


def test_nothing_but_the_weights_decides() -> None:
    check_what_decides(SVD(), "llama", data=False)


def test_saved_and_generating(tmp_path):
    check_saved_and_generating(SVD(), "llama", 0.4, tmp_path)
    check_saved_and_generating(SVD(), "opt", 0.4, tmp_path)
