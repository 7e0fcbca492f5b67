import pytest
import torch

from modegpt.decompositions import linalg
from modegpt.decompositions.linalg import all_finite, energy, inverse_diagonal, psd_cholesky, relative
from tests.decompositions.cases import normal


def test_well_conditioned_factor_is_plain_cholesky():
    X = normal(3, 50, 7, seed=0)
    C = X.mT @ X
    factor = psd_cholesky(C)
    assert factor.numerics == {}
    torch.testing.assert_close(factor.root(), torch.linalg.cholesky(C), rtol=1e-12, atol=1e-12)
    B = normal(3, 7, 4, seed=1)
    torch.testing.assert_close(factor.solve(B), torch.linalg.solve(C, B), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        factor.inverse_diagonal(), torch.linalg.inv(C).diagonal(dim1=-2, dim2=-1), rtol=1e-10, atol=0
    )


def test_singular_matrix_is_jittered_and_reported():
    X = normal(5, 12, seed=0)  # fewer tokens than channels
    factor = psd_cholesky(X.mT @ X)
    assert factor.numerics["jitter"] <= 1e-11
    assert factor.numerics["num_jittered"] == 1
    C = X.mT @ X
    L = factor.root()
    assert (L @ L.mT - C).abs().max() < 1e-10 * C.diagonal().max()


@pytest.mark.parametrize("jitter", [1e-12, 1e-11, 1e-10, 1e-9, 1e-8])
def test_the_jitter_is_the_smallest_that_makes_it_definite(jitter: float):
    """Of two channels that agree a little better than they could."""
    C = torch.tensor([[1.0, 1 + jitter / 2], [1 + jitter / 2, 1.0]], dtype=torch.float64)
    factor = psd_cholesky(torch.stack([C, torch.eye(2).double()]))
    assert factor.numerics == {"jitter": jitter, "num_jittered": 1}
    expected = torch.linalg.cholesky(C + jitter * torch.eye(2))
    torch.testing.assert_close(factor.root()[0], expected, rtol=1e-5, atol=1e-6)


def test_only_the_singular_matrix_of_a_batch_is_jittered():
    X = normal(2, 30, 6, seed=0)
    X[1, :, 3] = X[1, :, 2]
    C = X.mT @ X
    factor = psd_cholesky(C)
    assert factor.numerics["num_jittered"] == 1
    torch.testing.assert_close(factor.root()[0], torch.linalg.cholesky(C[0]), rtol=1e-12, atol=1e-12)


def test_a_channel_is_dead_beside_the_others_of_its_own_matrix():
    """However quiet a whole matrix is beside another of the batch, as a head is that the values of one layer avoid."""
    X = normal(2, 30, 6, seed=0) * torch.tensor([1e20, 1.0]).view(2, 1, 1)
    factor = psd_cholesky(X.mT @ X)
    assert factor.numerics == {}
    torch.testing.assert_close(factor.root(), torch.linalg.cholesky(X.mT @ X), rtol=1e-10, atol=1e-12)
    X[0, :, 2] = 0
    assert psd_cholesky(X.mT @ X).numerics == {"num_dead": 1}


def test_jitter_is_blind_to_outlier_channels():
    """A duplicate pair beside a channel with 1e12 times their energy is solved to 1e-9 all the same."""
    X = normal(40, 6, seed=0)
    X[:, 5] = X[:, 4]
    X[:, 0] *= 1e6
    C = X.mT @ X
    y = X @ normal(6, 2, seed=1)
    W = psd_cholesky(C).solve(X.mT @ y)
    assert float((y - X @ W).norm() / y.norm()) < 1e-9


def test_dead_channels_get_nothing_and_are_counted():
    X = normal(30, 6, seed=0)
    X[:, [1, 4]] = 0
    factor = psd_cholesky(X.mT @ X)
    assert factor.numerics == {"num_dead": 2}
    alive = [0, 2, 3, 5]
    B = X.mT @ normal(30, 2, seed=1)
    W = factor.solve(B)
    assert (W[[1, 4]] == 0).all()
    torch.testing.assert_close(
        W[alive], torch.linalg.solve((X.mT @ X)[alive][:, alive], B[alive]), rtol=1e-10, atol=1e-12
    )


def test_all_dead():
    factor = psd_cholesky(torch.zeros(2, 3, 3))
    assert factor.numerics == {"num_dead": 6}
    assert torch.isfinite(factor.root()).all()


def test_indefinite_matrix_has_its_eigenvalues_floored():
    """As from a Gram accumulated in low precision."""
    X = normal(4, 10, seed=0)
    noise = normal(10, 10, seed=1)
    C = X.mT @ X + 1e-4 * (noise + noise.mT)
    factor = psd_cholesky(C)
    assert factor.numerics["num_floored"] == 1
    L = factor.root()
    assert (L @ L.mT - C).abs().max() < 1e-2
    assert torch.linalg.eigvalsh(L @ L.mT)[0] > 0


def test_works_in_float64_and_leaves_its_input():
    X = normal(30, 6, seed=0).float()
    C = X.mT @ X
    before = C.clone()
    assert psd_cholesky(C).root().dtype == torch.float64
    assert torch.equal(C, before)


def test_energy_and_relative():
    X, W = normal(20, 5, seed=0), normal(5, 3, seed=1)
    assert float(energy(X.mT @ X, W)) == pytest.approx(float((X @ W).square().sum()), rel=1e-12)
    assert relative(torch.tensor(-1e-20), torch.tensor(2.0)) == 0.0
    assert relative(torch.tensor(0.0), torch.tensor(0.0)) == 0.0


@pytest.mark.parametrize("n", [40, 41, 63])
def test_large_matrices_in_blocks_give_the_same(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    X, W = normal(90, n, seed=0), normal(n, 5, seed=1)
    C = X.mT @ X
    L = torch.linalg.cholesky(C)
    whole = inverse_diagonal(L), energy(C, W), psd_cholesky(C)
    monkeypatch.setattr(linalg, "BLOCK_ROWS", 16)
    blocks = inverse_diagonal(L), energy(C, W), psd_cholesky(C)
    torch.testing.assert_close(blocks[0], whole[0], rtol=1e-11, atol=0)
    torch.testing.assert_close(blocks[0], torch.linalg.inv(C).diagonal(), rtol=1e-10, atol=0)
    torch.testing.assert_close(blocks[1], ((X @ W) ** 2).sum(), rtol=1e-11, atol=0)
    torch.testing.assert_close(blocks[2].solve(W), whole[2].solve(W), rtol=1e-9, atol=1e-12)
    assert (blocks[2].scale.unsqueeze(1) * blocks[2].lower @ blocks[2].root().mT - C).abs().max() < 1e-10 * C.max()
    singular = psd_cholesky(C[:, :1] * C[:1])
    assert singular.numerics["jitter"] <= 1e-11 and torch.isfinite(singular.lower).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_all_finite_finds_one_bad_element(value):
    X = normal(5, 7, seed=0)
    assert all_finite(X)
    X[3, 2] = value
    assert not all_finite(X)


def test_all_finite_is_not_fooled_by_a_sum_that_overflows():
    assert all_finite(torch.full((4,), 6e4, dtype=torch.float16))
    assert not all_finite(torch.tensor([float("inf"), -float("inf")]))
