"""Closed-form error curves against the variants at each rank."""

import pytest
import torch

from modegpt.decompositions import MLPElimination, QueryKeyCR, ValueOutputSVD
from modegpt.decompositions.curves import mlp_curve, query_key_curve, value_output_curve
from modegpt.decompositions.modules import (
    MLPWeights,
    QueryKeyWeights,
    ValueOutputWeights,
)

GENERATOR = torch.Generator()


def gram(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape[:-1], 40, shape[-1], dtype=torch.float64)
    return x.mT @ x


def test_mlp() -> None:
    W_U, W_G, W_Dt = (torch.randn(6, 10, dtype=torch.float64) for _ in range(3))
    weights = MLPWeights(W_U, W_G, W_Dt.T)
    C = gram(10)
    (curve, order), total = mlp_curve(C, weights.W_D, ridge=0.0), float((weights.W_D * (C @ weights.W_D)).sum())
    for rank in range(1, 10):
        reduction = MLPElimination(ridge=0.0)(weights, {"mlp.C": C}, rank, GENERATOR)
        assert float(curve[10 - rank]) / total == pytest.approx(reduction.relative_error, rel=1e-6)
        assert reduction.kept.tolist() == sorted(order[10 - rank :].tolist())
    assert float(curve[10]) == pytest.approx(total)


def test_value_output() -> None:
    weights = ValueOutputWeights(torch.randn(2, 12, 5, dtype=torch.float64), torch.randn(4, 5, 12, dtype=torch.float64))
    G = gram(2, 5)
    curve, P, B = value_output_curve(G, weights.W_O)
    for rank in range(1, 5):
        reduction = ValueOutputSVD()(weights, {"value_output.G": G}, rank, GENERATOR)
        assert float(curve[5 - rank] / curve[5]) == pytest.approx(reduction.relative_error, rel=1e-8)
        product = (reduction.weights.W_V.repeat_interleave(2, dim=0) @ reduction.weights.W_O).unflatten(0, (2, 2))
        torch.testing.assert_close((weights.W_V @ P[..., :rank]).unsqueeze(1) @ B[:, :, :rank], product)


@pytest.mark.parametrize("rope", [False, True])
def test_query_key(rope: bool) -> None:
    weights = QueryKeyWeights(
        torch.randn(4, 12, 6, dtype=torch.float64), torch.randn(2, 12, 6, dtype=torch.float64), rope=rope
    )
    C_Q, C_K = gram(4, 6), gram(2, 6)
    curve, order = query_key_curve(C_Q, C_K, rope=rope)
    unit = 2 if rope else 1
    for rank in range(unit, 6, unit):
        reduction = QueryKeyCR()(weights, {"query_key.C_Q": C_Q, "query_key.C_K": C_K}, rank, GENERATOR)
        assert float(curve[(6 - rank) // unit] / curve[-1]) == pytest.approx(reduction.relative_error, rel=1e-8)
        kept = order[:, (6 - rank) // unit :].sort().values
        assert torch.equal(reduction.kept[:, : rank // unit], kept)
