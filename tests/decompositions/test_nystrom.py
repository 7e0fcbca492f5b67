import pytest
import torch

from modegpt.decompositions import MLPColumns, MLPNystrom, MLPNystromBias
from modegpt.decompositions.modules import MLPWeights
from modegpt.decompositions.nystrom import refit, ridge_leverage
from tests.decompositions.cases import MLPCase, generator, mlp_case, mlp_states, normal

FORMS = [(True, False), (False, True), (True, True)]  # gated, bias


def with_states(h: torch.Tensor, d_h: int = 10) -> MLPCase:
    n = h.shape[1]
    return MLPCase(weights=MLPWeights(W_U=normal(d_h, n, seed=1), W_G=None, W_D=normal(n, d_h, seed=2)), h=h)


@pytest.mark.parametrize("ridge", [1.0, 1e-2, 1e-6])
def test_ridge_leverage_against_eigendecomposition(ridge):
    C = mlp_case().statistics["mlp.C"]
    lam = ridge * C.diagonal().mean()
    eigenvalues, U = torch.linalg.eigh(C)
    oracle = (U.square() * (eigenvalues / (eigenvalues + lam))).sum(dim=1)
    torch.testing.assert_close(ridge_leverage(C, ridge), oracle, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        oracle, (C @ torch.linalg.inv(C + lam * torch.eye(len(C), dtype=C.dtype))).diagonal(), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("gated,bias", FORMS)
@pytest.mark.parametrize("rank", [1, 9, 23])
def test_solve_is_the_least_squares_optimum(gated, bias, rank):
    case = mlp_case(gated=gated, bias=bias)
    result = MLPNystrom()(case.weights, case.statistics, rank, generator())
    h_S, dense = case.h[:, result.kept], case.h @ case.weights.W_D
    oracle = torch.linalg.lstsq(h_S, dense).solution
    torch.testing.assert_close(result.weights.W_D, oracle, rtol=1e-9, atol=1e-10)
    assert result.relative_error == pytest.approx(case.output_error(h_S, oracle), rel=1e-9)
    assert result.numerics == {}


@pytest.mark.parametrize("gated,bias", FORMS)
def test_reduced_mlp_computes_the_kept_channels(gated, bias):
    case = mlp_case(gated=gated, bias=bias)
    reduced = MLPNystrom()(case.weights, case.statistics, 9, generator())
    x = normal(7, 10, seed=99)
    torch.testing.assert_close(mlp_states(reduced.weights, x), mlp_states(case.weights, x)[:, reduced.kept])
    assert reduced.weights.b_D is case.weights.b_D


def test_keeps_the_largest_leverage():
    case = mlp_case()
    kept = MLPNystrom(ridge=0.1)(case.weights, case.statistics, 9, generator()).kept
    oracle = ridge_leverage(case.statistics["mlp.C"], 0.1).topk(9).indices.sort().values
    assert torch.equal(kept, oracle)


def test_ridge_decides_between_loud_and_independent_channels():
    h = normal(200, 12, seed=3) * torch.logspace(0, 1, 12, dtype=torch.float64)
    h[:, 11] = h[:, 10]  # the two loudest channels say the same, and share one leverage
    case = with_states(h)
    assert MLPNystrom(ridge=1e3)(case.weights, case.statistics, 2, generator()).kept.tolist() == [10, 11]
    assert MLPNystrom(ridge=1e-9)(case.weights, case.statistics, 10, generator()).kept.tolist() == list(range(10))


def test_columns_keep_the_same_channels_without_the_solve():
    case = mlp_case(bias=True)
    nystrom = MLPNystrom()(case.weights, case.statistics, 9, generator())
    columns = MLPColumns()(case.weights, case.statistics, 9, generator())
    assert torch.equal(columns.kept, nystrom.kept)
    assert torch.equal(columns.weights.W_D, case.weights.W_D[columns.kept])
    assert columns.relative_error == pytest.approx(
        case.output_error(case.h[:, columns.kept], columns.weights.W_D), rel=1e-9
    )
    assert columns.relative_error > nystrom.relative_error


@pytest.mark.parametrize("bias", [False, True])
def test_bias_correction_is_the_least_squares_optimum_with_a_constant(bias):
    case = mlp_case(gated=False, bias=bias)
    plain = MLPNystrom()(case.weights, case.statistics, 9, generator())
    result = MLPNystromBias()(case.weights, case.statistics, 9, generator())
    assert torch.equal(result.kept, plain.kept)
    dense = case.h @ case.weights.W_D
    features = torch.cat([case.h[:, result.kept], torch.ones(len(case.h), 1, dtype=torch.float64)], dim=1)
    oracle = torch.linalg.lstsq(features, dense).solution
    torch.testing.assert_close(result.weights.W_D, oracle[:-1], rtol=1e-8, atol=1e-9)
    dense_bias = case.weights.b_D if bias else torch.zeros(10, dtype=torch.float64)
    torch.testing.assert_close(result.weights.b_D, dense_bias + oracle[-1], rtol=1e-8, atol=1e-9)
    error = float((dense - features @ oracle).square().sum() / dense.square().sum())
    assert result.relative_error == pytest.approx(error, rel=1e-8)
    assert result.relative_error < plain.relative_error


def test_bias_correction_with_constant_channels():
    """A channel that never changes is the constant feature again: it must not make the regression singular."""
    case = mlp_case()
    case.h[:, 0], case.h[:, 5] = 1000.1, 3.3
    result = MLPNystromBias()(case.weights, case.statistics, 23, generator())
    assert result.kept[0] == 0 and torch.equal(result.weights.W_D[0], case.weights.W_D[0])  # the bias does its work
    dense = case.h @ case.weights.W_D
    h_S = case.h[:, result.kept]
    fitted = h_S @ result.weights.W_D + result.weights.b_D
    features = torch.cat([h_S, torch.ones(len(case.h), 1, dtype=torch.float64)], dim=1)
    best = features @ torch.linalg.lstsq(features, dense, driver="gelsd").solution
    assert float((dense - fitted).square().sum() / (dense - best).square().sum()) - 1 < 1e-9


def test_fewer_tokens_than_channels():
    case = mlp_case(T=7)
    result = MLPNystrom()(case.weights, case.statistics, 12, generator())
    assert result.numerics["jitter"] <= 1e-10
    assert result.relative_error < 1e-9  # 12 channels span what 7 tokens show
    assert case.output_error(case.h[:, result.kept], result.weights.W_D) < 1e-9
    assert result.weights.W_D.abs().max() < 100 * case.weights.W_D.abs().max()


def test_dead_and_duplicate_channels():
    h = normal(200, 12, seed=5)
    h[:, 3] = 0
    h[:, 7] = h[:, 6]
    case = with_states(h)
    kept = torch.tensor([0, 1, 3, 5, 6, 7, 8])
    W_D, numerics = refit(case.statistics["mlp.C"], case.weights.W_D, kept)
    assert numerics["num_dead"] == 1 and numerics["num_jittered"] == 1
    best = torch.linalg.lstsq(h[:, kept], h @ case.weights.W_D, driver="gelsd").solution
    excess = case.output_error(h[:, kept], W_D) / case.output_error(h[:, kept], best) - 1
    assert excess < 1e-9
    assert torch.equal(W_D[2], case.weights.W_D[3])  # unobserved: left as it was
    assert ridge_leverage(case.statistics["mlp.C"], 1e-2)[3] == pytest.approx(0, abs=1e-15)


def test_mlp_without_any_activation():
    case = with_states(torch.zeros(20, 12, dtype=torch.float64))
    result = MLPNystrom()(case.weights, case.statistics, 5, generator())
    assert result.relative_error == 0.0
    assert torch.equal(result.weights.W_D, case.weights.W_D[result.kept])


def test_massive_activations():
    """Outliers 1000 times the rest, mixed into the others: float32 normal equations fail, ours match QR to 1e-6."""
    T, n = 600, 40
    h = normal(T, n, seed=7)
    outliers = [3, 17, 18]
    h[:, outliers] *= 1000
    h[:, 18] = h[:, 17] + 0.5 * normal(T, seed=8)  # two massive channels that nearly agree
    h += 0.02 * h[:, [3]]
    case = with_states(h)
    result = MLPNystrom()(case.weights, case.statistics, 30, generator())
    assert set(outliers) & set(result.kept.tolist())
    kept = torch.cat([result.kept, torch.tensor(outliers)]).unique()
    W_D, _ = refit(case.statistics["mlp.C"], case.weights.W_D, kept)

    h_S, dense = h[:, kept], h @ case.weights.W_D
    Q, R = torch.linalg.qr(h_S)
    reference = torch.linalg.solve_triangular(R, Q.mT @ dense, upper=True)
    C32 = (h_S.mT @ h_S).float()
    naive = torch.linalg.solve(C32, (h_S.mT @ dense).float()).double()

    def distance(W):  # residuals of the fit, against the residual that no fit can remove
        return float((h_S @ (W - reference)).norm() / (dense - h_S @ reference).norm())

    assert distance(naive) > 1e-2
    assert distance(W_D) < 1e-6
    assert float((W_D - reference).norm() / reference.norm()) < 1e-6


def test_statistics_may_be_float32():
    case = mlp_case()
    statistics = {"mlp.C": case.statistics["mlp.C"].float()}
    result = MLPNystrom()(case.weights, statistics, 9, generator())
    exact = MLPNystrom()(case.weights, case.statistics, 9, generator())
    assert result.relative_error == pytest.approx(exact.relative_error, rel=1e-3)
