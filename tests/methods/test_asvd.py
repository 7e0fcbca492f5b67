"""ASVD: channels weigh as much as their inputs say."""

import pytest
import torch

from modegpt.errors import UserError
from modegpt.methods.asvd import ASVD, channel_scale
from modegpt.methods.low_rank import truncated
from tests.methods.protocol_checks import (
    FORMS,
    check_compression,
    check_saved_and_generating,
    check_what_decides,
    check_zero_sparsity,
    linear_errors,
)


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
    result = ASVD().factorise(W, X.T @ X, rank=3)
    torch.testing.assert_close(result.factors.A @ result.factors.B, ((U[:, :3] * S[:3]) @ Vh[:3]) / s[:, None])
    assert result.relative_error == pytest.approx((S[3:].square().sum() / S.square().sum()).item(), rel=1e-10)


def test_without_activations_in_the_scale_it_is_plain_svd():
    X, W = inputs(), torch.randn(10, 8, dtype=torch.float64)
    scaled, plain = ASVD(alpha=0.0).factorise(W, X.T @ X, rank=3).factors, truncated(W, 3).factors
    torch.testing.assert_close(scaled.A @ scaled.B, plain.A @ plain.B)


def test_full_weight_of_activations_is_optimal_for_uncorrelated_inputs():
    X = inputs(num_rows=20000)
    C = torch.diag((X.T @ X).diagonal())
    W = torch.randn(10, 8, dtype=torch.float64)

    def loss(alpha: float) -> float:
        factors = ASVD(alpha=alpha).factorise(W, C, rank=3).factors
        E = W - factors.A @ factors.B
        return (E * (C @ E)).sum().item()

    assert loss(1.0) < loss(0.5) < loss(0.0)


def test_a_dead_channel_is_survived():
    X, W = inputs(), torch.randn(10, 8, dtype=torch.float64)
    X[:, 4] = 0
    result = ASVD(alpha=1.0).factorise(W, X.T @ X, rank=5)
    assert torch.isfinite(result.factors.A).all()
    assert torch.isfinite(ASVD().factorise(W, torch.zeros(10, 10), rank=5).factors.A).all()


def test_alpha_is_checked():
    with pytest.raises(UserError, match=r"alpha=1\.5"):
        ASVD(alpha=1.5)


@pytest.mark.parametrize("form", FORMS)
def test_protocol(form: str):
    check_zero_sparsity(ASVD(), form)
    scaled = linear_errors(lambda C: C.diagonal().sqrt().diag())
    check_compression(ASVD(), form, 0.4, tolerance=0.01, errors=scaled)


def test_the_calibration_text_decides() -> None:
    check_what_decides(ASVD(), "llama")


def test_saved_and_generating(tmp_path):
    check_saved_and_generating(ASVD(), "qwen3", 0.4, tmp_path)
