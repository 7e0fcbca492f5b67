"""Streaming moments against one product in float64."""

import torch

from modegpt.calibration.moments import FirstMoment, SecondMoment


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
