"""Regression from sums: the closed forms against explicit rows."""

import pytest
import torch
from torch import Tensor

from modegpt.decompositions.regression import RIDGES, Moments, held_out_refit, ridge_towards


def rows(num_rows: int = 60, *, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Badly scaled features (rows, 7) and targets (rows, 3)."""
    z = torch.randn(num_rows, 7, dtype=torch.float64) * torch.logspace(-3, 3, 7, dtype=torch.float64)
    W = torch.randn(7, 3, dtype=torch.float64) / torch.logspace(-3, 3, 7, dtype=torch.float64).unsqueeze(1)
    return z, z @ W + noise * torch.randn(num_rows, 3, dtype=torch.float64)


def moments(z: Tensor, t: Tensor) -> Moments:
    empty = Moments.zeros(z.shape[1], t.shape[1])
    for chunk in zip(z.split(17), t.split(17), strict=True):
        empty = empty.updated(*chunk)
    return empty


def test_without_ridge_it_is_least_squares() -> None:
    z, t = rows()
    W, _ = ridge_towards(moments(z, t), torch.randn(7, 3, dtype=torch.float64))(0.0)
    torch.testing.assert_close(W, torch.linalg.lstsq(z, t).solution, rtol=1e-7, atol=1e-9)


def test_the_ridge_is_that_of_the_augmented_rows() -> None:
    z, t = rows()
    W_0 = torch.randn(7, 3, dtype=torch.float64)
    D = (z.square().sum(dim=0) * 0.05).sqrt().diag()
    expected = torch.linalg.lstsq(torch.cat([z, D]), torch.cat([t, D @ W_0])).solution
    W, _ = ridge_towards(moments(z, t), W_0)(0.05)
    torch.testing.assert_close(W, expected, rtol=1e-7, atol=1e-9)


def test_error_and_maps_are_those_of_the_rows() -> None:
    z, t = rows()
    W, P = torch.randn(4, 3, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    assert moments(z, t).mapped(P).error(W) == pytest.approx(float((z @ P @ W - t).square().sum()), rel=1e-9)
    S = torch.tensor([0, 3, 4, 6])
    assert moments(z, t).kept(S).error(W) == pytest.approx(float((z[:, S] @ W - t).square().sum()), rel=1e-9)
    dense = torch.randn(7, 3, dtype=torch.float64)
    assert moments(z, t).aimed(dense).kept(S).error(W) == pytest.approx(
        float((z[:, S] @ W - z @ dense).square().sum()), rel=1e-9
    )


@pytest.mark.parametrize("num_rows", [6, 12, 60])
def test_the_choice_is_never_worse_than_the_start_on_held_out_rows(num_rows: int) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        z, t = rows(num_rows + 20, noise=3.0)
        W_0 = torch.linalg.lstsq(z, t).solution + 0.01 * torch.randn(7, 3, dtype=torch.float64)
        fit, held = moments(z[:num_rows], t[:num_rows]), moments(z[num_rows:], t[num_rows:])
        refit = held_out_refit(fit, held, (W_0, W_0))
        assert refit.held_out[1] <= refit.held_out[0]
        assert refit.held_out[0] == pytest.approx(held.error(W_0) / float(held.energy))
        if refit.ridge == float("inf"):
            assert torch.equal(refit.W, W_0)


def test_few_noisy_rows_want_a_ridge_and_many_clean_ones_do_not() -> None:
    z, t = rows(400, noise=0.0)
    W_0 = torch.zeros(7, 3, dtype=torch.float64)
    assert held_out_refit(moments(z[:300], t[:300]), moments(z[300:], t[300:]), (W_0, W_0)).ridge == 0.0
    t = t + 30 * torch.randn(400, 3, dtype=torch.float64)
    assert held_out_refit(moments(z[:9], t[:9]), moments(z[300:], t[300:]), (W_0, W_0)).ridge >= 1e-1


def test_the_ridge_is_the_best_of_all_that_could_be_tried() -> None:
    chosen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        z, t = rows(40, noise=10.0 ** (seed % 8 - 5))
        W_0 = torch.linalg.lstsq(z, t).solution + 10.0 ** (seed % 5 - 2) * torch.randn(7, 3, dtype=torch.float64)
        fit, held = moments(z[: 8 + seed % 13], t[: 8 + seed % 13]), moments(z[20:], t[20:])
        W_all = W_0 + 0.1 * torch.randn(7, 3, dtype=torch.float64)
        refit, solve = held_out_refit(fit, held, (W_0, W_all)), ridge_towards(fit, W_0)
        errors = {float("inf"): held.error(W_0), **{ridge: held.error(solve(ridge)[0]) for ridge in RIDGES}}
        assert refit.ridge == min(errors, key=errors.__getitem__)
        assert refit.held_out[1] == pytest.approx(errors[refit.ridge] / float(held.energy))
        if refit.ridge != float("inf"):
            torch.testing.assert_close(refit.fitted, solve(refit.ridge)[0])
            torch.testing.assert_close(refit.W, ridge_towards(fit + held, W_all)(refit.ridge)[0])
        else:
            assert refit.fitted is W_0 and refit.W is W_all
        chosen.add(refit.ridge)
    assert {0.0, 1e-2, 1e-1, 1.0, 10.0, float("inf")} <= chosen
