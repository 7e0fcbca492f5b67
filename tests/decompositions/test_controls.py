import pytest
import torch

from modegpt.decompositions import (
    MLPMagnitude,
    MLPRandom,
    QueryKeyMagnitude,
    QueryKeyRandom,
    ValueOutputMagnitude,
    ValueOutputRandom,
)
from tests.decompositions.cases import HEADS, generator, mlp_case, query_key_case, value_output_case

heads = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())


@pytest.mark.parametrize("gated", [True, False])
def test_mlp_magnitude(gated):
    case = mlp_case(gated=gated, bias=True)
    W = case.weights
    result = MLPMagnitude()(W, case.statistics, 9, generator())
    scores = [
        float(W.W_U[:, j].norm() * W.W_D[j].norm() * (W.W_G[:, j].norm() if gated else 1.0))
        for j in range(W.inner_size)
    ]
    assert result.kept.tolist() == sorted(sorted(range(W.inner_size), key=lambda j: -scores[j])[:9])
    assert torch.equal(result.weights.W_D, W.W_D[result.kept])
    assert result.relative_error == pytest.approx(
        case.output_error(case.h[:, result.kept], result.weights.W_D), rel=1e-9
    )


@heads
@pytest.mark.parametrize("rope", [True, False])
def test_query_key_magnitude(heads, rope):
    case = query_key_case(heads=heads, rope=rope, bias=True, seed=2)
    W, d, group = case.weights, 8, heads[0] // heads[1]
    result = QueryKeyMagnitude()(W, case.statistics, 4, generator())
    for k in range(heads[1]):
        dims = [float(W.W_Q[k * group : (k + 1) * group, :, i].norm() * W.W_K[k, :, i].norm()) for i in range(d)]
        if rope:
            best = sorted(sorted(range(d // 2), key=lambda i: -dims[i] - dims[i + d // 2])[:2])
            expected = best + [i + d // 2 for i in best]
        else:
            expected = sorted(sorted(range(d), key=lambda i: -dims[i])[:4])
        assert result.kept[k].tolist() == expected
    assert torch.equal(result.weights.b_K, W.b_K.gather(1, result.kept))


@heads
def test_value_output_magnitude(heads):
    case = value_output_case(heads=heads, bias=True)
    case.weights.W_O[-1] = 3 * case.weights.W_O[-1].flip(0)  # the heads of a group disagree
    W, group = case.weights, heads[0] // heads[1]
    result = ValueOutputMagnitude()(W, case.statistics, 5, generator())
    for k in range(heads[1]):
        scores = [float(W.W_V[k, :, i].norm() * W.W_O[k * group : (k + 1) * group, i].norm()) for i in range(8)]
        assert result.kept[k].tolist() == sorted(sorted(range(8), key=lambda i: -scores[i])[:5])
    for h in range(heads[0]):
        assert torch.equal(result.weights.W_O[h], W.W_O[h][result.kept[h // group]])
    assert result.relative_error == pytest.approx(case.value_error(result.weights), rel=1e-9)
    assert result.weights.b_V is None


RANDOM = [
    (MLPRandom, mlp_case, {}),
    (QueryKeyRandom, query_key_case, {"heads": (6, 2), "rope": True}),
    (QueryKeyRandom, query_key_case, {"heads": (6, 2), "rope": False}),
    (ValueOutputRandom, value_output_case, {"heads": (6, 2)}),
]


@pytest.mark.parametrize("variant,build,options", RANDOM)
def test_random_follows_its_generator_alone(variant, build, options):
    case = build(**options)
    rank = case.weights.inner_size // 2
    draws = [variant()(case.weights, case.statistics, rank, generator(seed)).kept for seed in range(20)]
    torch.manual_seed(123)
    again = variant()(case.weights, case.statistics, rank, generator(3)).kept
    assert torch.equal(again, draws[3])
    assert len({tuple(kept.flatten().tolist()) for kept in draws}) > 10
    if options.get("rope"):
        assert all(torch.equal(kept[:, rank // 2 :], kept[:, : rank // 2] + 4) for kept in draws)


def test_random_is_uniform():
    case = mlp_case(n=10)
    g = generator()
    counts = torch.zeros(10)
    for _ in range(1000):
        counts[MLPRandom()(case.weights, case.statistics, 3, g).kept] += 1
    assert (counts - 300).abs().max() < 75  # five standard deviations
