import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from modegpt.decompositions import MLPElimination, MLPNystrom, ValueOutputColumns, ValueOutputSVD
from modegpt.decompositions.elimination import _panel, eliminate
from tests.decompositions.cases import HEADS, generator, mlp_case, normal, value_output_case


def residual(h: torch.Tensor, dense: torch.Tensor, kept: list[int]) -> float:
    """The least squared error of ``dense`` from the kept channels."""
    return float((dense - h[:, kept] @ torch.linalg.lstsq(h[:, kept], dense).solution).square().sum())


def test_every_step_is_the_brute_force_removal():
    case = mlp_case(T=60, d_h=5, n=12)
    dense = case.h @ case.weights.W_D
    removed, costs = eliminate(case.statistics["mlp.C"], case.weights.W_D, 3, ridge=0.0, block=4)
    kept, last = list(range(12)), 0.0
    for j, cost in zip(removed.tolist(), costs.tolist(), strict=True):
        errors = {i: residual(case.h, dense, [c for c in kept if c != i]) for i in kept}
        assert j == min(errors, key=errors.get)
        assert cost == pytest.approx(errors[j] - last, rel=1e-8, abs=1e-8)
        kept.remove(j)
        last = errors[j]


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_block_changes_nothing(ridge):
    case = mlp_case(n=40, T=300)
    runs = [
        eliminate(case.statistics["mlp.C"], case.weights.W_D, 11, ridge=ridge, block=block) for block in (1, 7, 128)
    ]
    for removed, costs in runs[1:]:
        assert torch.equal(removed, runs[0][0])
        torch.testing.assert_close(costs, runs[0][1], rtol=1e-8, atol=1e-10)


def test_elimination_is_the_least_squares_optimum_and_beats_leverage():
    case = mlp_case(n=40, T=300, bias=True)
    result = MLPElimination()(case.weights, case.statistics, 20, generator())
    oracle = torch.linalg.lstsq(case.h[:, result.kept], case.h @ case.weights.W_D).solution
    torch.testing.assert_close(result.weights.W_D, oracle, rtol=1e-8, atol=1e-9)
    nystrom = MLPNystrom()(case.weights, case.statistics, 20, generator())
    assert result.relative_error < nystrom.relative_error
    assert torch.equal(result.weights.b_U, case.weights.b_U[result.kept])


def test_output_matrix_decides():
    """Channels that W_D does not read go first, however loud they are."""
    case = mlp_case()
    unread = [2, 9, 20]
    case.weights.W_D[unread] = 0
    case.h[:, unread] *= 100
    removed, costs = eliminate(case.statistics["mlp.C"], case.weights.W_D, 20, ridge=0.0, block=128)
    assert set(removed[:3].tolist()) == set(unread)
    assert costs[:3].abs().max() < 1e-9 * costs[3]


def test_rank_deficient_statistics():
    """Dead and duplicate channels, and fewer tokens than channels, cost nothing to remove down to the rank."""
    case = mlp_case(T=300)
    case.h[:, 4] = 0
    case.h[:, 11] = case.h[:, 3]
    result = MLPElimination()(case.weights, case.statistics, 22, generator())
    assert 4 not in result.kept and not {3, 11} <= set(result.kept.tolist())
    assert result.relative_error < 1e-10
    few = mlp_case(T=7)
    result = MLPElimination()(few.weights, few.statistics, 7, generator())
    assert result.relative_error < 1e-6
    assert few.output_error(few.h[:, result.kept], result.weights.W_D) < 1e-6


def test_ridge_keeps_the_downdates_accurate_where_the_statistics_are_singular():
    """The predicted errors of 280 removals from 300 channels that 40 tokens show, against the refit of what is left."""
    case = mlp_case(T=40, n=300)
    dense = case.h @ case.weights.W_D

    def discrepancy(ridge):
        removed, costs = eliminate(case.statistics["mlp.C"], case.weights.W_D, 20, ridge=ridge, block=128)
        kept = sorted(set(range(300)) - set(removed.tolist()))
        return abs(float(costs.sum()) / residual(case.h, dense, kept) - 1)

    assert discrepancy(1e-6) < 1e-4


def test_massive_activations_do_not_change_the_choice():
    """Scaling a channel and its row of W_D inversely leaves the function, so also the choice, as it was."""
    case = mlp_case(n=30, T=300)
    scale = torch.ones(30, dtype=torch.float64)
    scale[[3, 17]] = 1000
    plain = MLPElimination()(case.weights, case.statistics, 18, generator())
    case.h = case.h * scale
    case.weights = type(case.weights)(
        W_U=case.weights.W_U * scale, W_G=case.weights.W_G, W_D=case.weights.W_D / scale[:, None]
    )
    scaled = MLPElimination()(case.weights, case.statistics, 18, generator())
    assert torch.equal(plain.kept, scaled.kept)
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-6)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_value_columns_are_refitted_by_least_squares(heads):
    case = value_output_case(heads=heads)
    result = ValueOutputColumns()(case.weights, case.statistics, 5, generator())
    group = heads[0] // heads[1]
    for h in range(heads[0]):
        kept = result.kept[h // group]
        oracle = torch.linalg.lstsq(case.v[h // group][:, kept], case.v[h // group] @ case.weights.W_O[h]).solution
        torch.testing.assert_close(result.weights.W_O[h], oracle, rtol=1e-8, atol=1e-10)
        assert torch.equal(result.weights.W_V[h // group], case.weights.W_V[h // group][:, kept])
    assert result.relative_error == pytest.approx(case.value_error(result.weights), rel=1e-9)
    assert result.relative_error >= ValueOutputSVD()(case.weights, case.statistics, 5, generator()).relative_error


def test_value_columns_fold_the_bias():
    case = value_output_case(heads=(6, 2), bias=True)
    case.weights.W_O[:, 3] = 0
    reduced = ValueOutputColumns()(case.weights, case.statistics, 7, generator()).weights
    assert reduced.b_V is None
    torch.testing.assert_close(case.module_output(reduced), case.module_output(), rtol=1e-8, atol=1e-8)


def test_larger_problem_stays_accurate():
    """400 removals by downdates, against the refitted error of the final set."""
    h = (
        normal(1500, 500, seed=0)
        @ torch.diag(torch.logspace(0, -3, 500, dtype=torch.float64))
        @ normal(500, 500, seed=1)
    )
    W = normal(500, 20, seed=2)
    removed, costs = eliminate(h.mT @ h, W, 100, ridge=0.0, block=64)
    kept = sorted(set(range(500)) - set(removed.tolist()))
    assert float(costs.sum()) == pytest.approx(residual(h, h @ W, kept), rel=1e-6)


def test_its_small_steps_are_one_operation_to_whoever_watches() -> None:
    class Watch(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    C, W = torch.eye(24, dtype=torch.float64) + 0.1, torch.ones(24, 3, dtype=torch.float64)
    watched = []
    for rank in (20, 4):
        with Watch() as watch:
            eliminate(C, W, rank, ridge=0.0, block=24)
        watched.append(watch.calls)
    assert watched[0] == watched[1]


def test_a_panel_waits_for_no_device() -> None:
    """Tensors without values cannot be waited for."""
    with FakeTensorMode():
        steps, costs, alive, pending = _panel(torch.empty(2, 9, 9, dtype=torch.float64), 4)
        with pytest.raises(Exception, match=r"_local_scalar_dense"):
            int(costs.argmin())
    assert steps.shape == costs.shape == (4,) and alive.shape == (9,) and pending.shape == (2, 4, 9)
