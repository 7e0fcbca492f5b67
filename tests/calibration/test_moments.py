"""Streaming moments against one product in float64."""

import pytest
import torch

from modegpt.calibration.moments import FirstMoment, SecondMoment
from modegpt.decompositions import linalg
from modegpt.decompositions.regression import Moments


def test_second_moment_equals_one_product() -> None:
    rows = torch.randn(5000, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moment = SecondMoment.zeros(3, 7)
    for chunk in rows.split([17, 4000, 983]):
        moment.update(chunk)
    torch.testing.assert_close(moment.value, torch.einsum("tgi,tgj->gij", rows, rows), rtol=1e-12, atol=1e-9)


def test_float32_products_keep_a_float64_sum() -> None:
    rows = torch.randn(200_000, 1, 4, generator=torch.Generator().manual_seed(1)) + 10.0
    exact = torch.einsum("tgi,tgj->gij", rows.double(), rows.double())
    moment = SecondMoment.zeros(1, 4, precision=torch.float32)
    moment.update(rows)
    error = (moment.value - exact).abs().max() / exact.abs().max()
    assert moment.value.dtype == torch.float64
    assert error < 1e-7


def test_float64_gram_of_few_rows_stays_positive_semidefinite() -> None:
    rows = torch.randn(5, 1, 40, generator=torch.Generator().manual_seed(2))
    moment = SecondMoment.zeros(1, 40)
    moment.update(rows)
    eigenvalues = torch.linalg.eigvalsh(moment.value[0])
    assert eigenvalues.min() > -1e-12 * eigenvalues.max()


def test_first_moment_sums_rows() -> None:
    rows = torch.randn(300, 6, generator=torch.Generator().manual_seed(3))
    moment = FirstMoment.zeros(6)
    moment.update(rows[:100])
    moment.update(rows[100:])
    torch.testing.assert_close(moment.value, rows.double().sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
def test_blocks_above_the_diagonal_are_mirrored(precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A width that is no multiple of the block, read between two updates: the mirror must not be summed twice."""
    monkeypatch.setitem(linalg.SYMMETRIC_BLOCK, "cpu", 3)
    rows = torch.randn(60, 2, 8, generator=torch.Generator().manual_seed(4)).double()
    moment = SecondMoment.zeros(2, 8, precision=precision)
    for chunk in rows.split(20):
        moment.update(chunk)
        assert torch.equal(moment.value[:, 3:, :3], moment.value[:, :3, 3:].mT)
    expected = torch.einsum("tgi,tgj->gij", rows, rows)
    torch.testing.assert_close(moment.value, expected, rtol=0, atol=1e-12 if precision is torch.float64 else 1e-5)


def test_regression_moments_are_those_of_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linalg.SYMMETRIC_BLOCK, "cpu", 3)
    z, t = (torch.randn(60, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64) for size in (8, 2))
    sums = Moments.zeros(8, 2)
    for rows, targets in zip(z.split(20), t.split(20), strict=True):
        sums = sums.updated(rows, targets)
        assert torch.equal(sums.G[3:, :3], sums.G[:3, 3:].mT)
    torch.testing.assert_close(sums.G, z.mT @ z)
    torch.testing.assert_close(sums.X, z.mT @ t)
    assert sums.num_rows == 60


def test_float32_rows_of_a_regression_are_summed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows there are: only products of a chunk are rounded."""
    monkeypatch.setattr("modegpt.decompositions.regression.CHUNK_ROWS", 8)
    z = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(6)) + 1
    sums = Moments.zeros(3, 3).updated(z, z)
    expected = z.double().mT @ z.double()
    assert max(float((each / expected - 1).abs().max()) for each in (sums.G, sums.X)) < 3e-9
    assert float((z.mT @ z).double().div(expected).sub(1).abs().max()) > 3e-9, "one float32 product is further off"
