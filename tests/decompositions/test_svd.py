import pytest
import torch

from modegpt.decompositions import MLPSVD, QueryKeySVD, ValueOutputSVD, ValueOutputSVDAttention, ValueOutputSVDPerHead
from modegpt.decompositions.modules import LowRank
from modegpt.decompositions.svd import product_svd
from modegpt.errors import UserError
from tests.decompositions.cases import (
    HEADS,
    generator,
    matrix_root,
    mlp_case,
    query_key_case,
    value_output_case,
)

heads = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())


def paper_long_form(case, k: int) -> torch.Tensor:
    """(H, d_h, d_h): the paper's two SVDs through C^1/2 (d_h x d_h), on the output blocks of a group side by side."""
    weights, C_root = case.weights, matrix_root(case.x.mT @ case.x)
    group = len(weights.W_O) // len(weights.W_V)
    maps, grouped = [], weights.W_O.reshape(len(weights.W_V), group, *weights.W_O.shape[1:])
    for W_V, W_O in zip(weights.W_V, grouped, strict=True):
        U, S, Vh = torch.linalg.svd(C_root @ W_V, full_matrices=False)
        U2, S2, Vh2 = torch.linalg.svd(S[:, None] * Vh @ torch.cat(list(W_O), dim=1), full_matrices=False)
        product = torch.linalg.inv(C_root) @ U @ U2[:, :k] @ (S2[:k, None] * Vh2[:k])
        maps += product.split(W_O.shape[-1], dim=1)
    return torch.stack(maps)


@heads
@pytest.mark.parametrize("rank", [1, 5, 7])
def test_value_output_equals_the_papers_long_form(heads, rank):
    case = value_output_case(heads=heads)
    result = ValueOutputSVD()(case.weights, case.statistics, rank, generator())
    assert result.weights.W_V.shape[-1] == result.weights.W_O.shape[1] == rank
    long_form = paper_long_form(case, rank)
    difference = (case.maps(result.weights) - long_form).norm() / long_form.norm()
    assert float(difference) < 1e-12
    assert result.numerics == {}


@heads
def test_value_output_error_is_the_dropped_singular_values(heads):
    case = value_output_case(heads=heads)
    result = ValueOutputSVD()(case.weights, case.statistics, 5, generator())
    outputs = case.x @ case.maps()
    group = len(case.weights.W_O) // len(case.weights.W_V)
    dropped = sum(
        float(torch.linalg.svdvals(torch.cat(list(block), dim=1))[5:].square().sum())
        for block in outputs.reshape(-1, group, *outputs.shape[1:])
    )
    assert result.relative_error == pytest.approx(dropped / float(outputs.square().sum()), rel=1e-9)
    assert result.relative_error == pytest.approx(case.value_error(result.weights), rel=1e-9)


def test_factors_are_balanced():
    case = value_output_case(heads=(6, 2))
    reduced = ValueOutputSVD()(case.weights, case.statistics, 5, generator()).weights
    rows = reduced.W_O.reshape(2, 3, 5, -1).norm(dim=(1, 3))
    torch.testing.assert_close(reduced.W_V.norm(dim=1), rows, rtol=1e-10, atol=0)


@heads
def test_joint_svd_beats_truncation_per_head(heads):
    case = value_output_case(heads=heads)
    joint = ValueOutputSVD()(case.weights, case.statistics, 4, generator())
    alone = ValueOutputSVDPerHead()(case.weights, case.statistics, 4, generator())
    assert alone.relative_error == pytest.approx(case.value_error(alone.weights), rel=1e-9)
    assert joint.relative_error < 0.9 * alone.relative_error


@heads
def test_truncation_per_head_is_the_best_rank_k_of_the_values(heads):
    case = value_output_case(heads=heads)
    reduced = ValueOutputSVDPerHead()(case.weights, case.statistics, 4, generator()).weights
    for v, W_V in zip(case.v, reduced.W_V, strict=True):
        _, S, _ = torch.linalg.svd(v, full_matrices=False)
        projected = case.x @ W_V  # coordinates in an orthonormal basis of the kept subspace
        assert float(projected.square().sum()) == pytest.approx(float(S[:4].square().sum()), rel=1e-10)


@heads
@pytest.mark.parametrize("output_bias", [True, False])
@pytest.mark.parametrize("variant", [ValueOutputSVD, ValueOutputSVDPerHead, ValueOutputSVDAttention])
def test_value_bias_is_folded_exactly(heads, output_bias, variant):
    """With G of full rank and one dim that nothing reads, the reduced module equals the dense one, biases and all."""
    case = value_output_case(heads=heads, bias=True)
    W_O = case.weights.W_O.clone()
    W_O[:, 3] = 0
    case.weights = type(case.weights)(
        W_V=case.weights.W_V, W_O=W_O, b_V=case.weights.b_V, b_O=case.weights.b_O if output_bias else None
    )
    if variant is ValueOutputSVDPerHead:  # looks at values alone, so the unread dim must also be silent
        case.weights.W_V[:, :, 3] = 0
        case.v[:, :, 3] = 0
    reduced = variant()(case.weights, case.statistics, 7, generator()).weights
    assert reduced.b_V is None
    torch.testing.assert_close(case.module_output(reduced), case.module_output(), rtol=1e-8, atol=1e-8)


def test_no_output_bias_appears_without_a_value_bias():
    case = value_output_case(heads=(6, 2))
    assert ValueOutputSVD()(case.weights, case.statistics, 4, generator()).weights.b_O is None


def test_attention_svd_is_optimal_for_multi_head():
    case = value_output_case(heads=(4, 4))
    result = ValueOutputSVDAttention()(case.weights, case.statistics, 5, generator())
    outputs = case.a @ case.weights.W_O
    dropped = torch.linalg.svdvals(outputs)[:, 5:].square().sum() / outputs.square().sum()
    assert result.relative_error == pytest.approx(float(dropped), rel=1e-9)
    assert result.relative_error == pytest.approx(case.attention_error(result.weights), rel=1e-9)
    plain = ValueOutputSVD()(case.weights, case.statistics, 5, generator())
    assert result.relative_error < case.attention_error(plain.weights)


@pytest.mark.parametrize("heads", [(6, 2), (3, 1)])
def test_attention_svd_refits_every_head_of_a_group(heads):
    case = value_output_case(heads=heads)
    result = ValueOutputSVDAttention()(case.weights, case.statistics, 4, generator())
    assert result.relative_error == pytest.approx(case.attention_error(result.weights), rel=1e-9)

    group = heads[0] // heads[1]
    compressed = case.attention @ (case.x @ result.weights.W_V).repeat_interleave(group, dim=0)
    oracle = torch.linalg.lstsq(compressed, case.a @ case.weights.W_O).solution
    torch.testing.assert_close(result.weights.W_O, oracle, rtol=1e-8, atol=1e-10)

    grouped = case.weights.W_O.reshape(heads[1], group, *case.weights.W_O.shape[1:])
    A = case.statistics["value_output.A"].reshape(heads[1], group, *case.statistics["value_output.A"].shape[1:])
    P, B, _, _ = product_svd(A.sum(dim=1), grouped, 4)
    residual = grouped - P.unsqueeze(1) @ B
    pooled = float((residual * (A @ residual)).sum() / (grouped * (A @ grouped)).sum())
    assert result.relative_error < pooled


def test_attention_svd_is_near_the_best_shared_transform():
    """The shared P has no closed form under grouped queries; descent from it gains little."""
    case = value_output_case(heads=(3, 1))
    result = ValueOutputSVDAttention()(case.weights, case.statistics, 4, generator())
    A, W = case.statistics["value_output.A"], case.weights.W_O
    P = product_svd(A.sum(dim=0, keepdim=True), W.unsqueeze(0), 4)[0][0].contiguous().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([P], max_iter=300, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def error():
        AP = A @ P
        B = torch.linalg.solve(P.mT @ AP, AP.mT @ W)
        R = W - P @ B
        return (R * (A @ R)).sum() / (W * (A @ W)).sum()

    def closure():
        optimizer.zero_grad()
        value = error()
        value.backward()
        return value

    start = error().item()
    optimizer.step(closure)
    best = error().item()
    assert start == pytest.approx(result.relative_error, rel=1e-8)
    assert best <= start < 1.05 * best


def test_value_output_with_few_tokens_and_dead_values():
    case = value_output_case(heads=(6, 2), T=5)
    case.weights.W_V[:, :, 2] = 0
    case.v[:, :, 2] = 0
    case.a[:, :, 2] = 0
    for variant in (ValueOutputSVD, ValueOutputSVDAttention):
        result = variant()(case.weights, case.statistics, 6, generator())
        assert result.numerics
        assert result.relative_error < 1e-9  # five tokens span five dims
        assert torch.isfinite(result.weights.W_V).all() and torch.isfinite(result.weights.W_O).all()
        measured = case.value_error if variant is ValueOutputSVD else case.attention_error
        assert measured(result.weights) < 1e-8


def test_massive_values():
    """Value dims 1000 times the rest: the error is still that of the singular values of the states."""
    case = value_output_case(heads=(4, 4), T=200)
    scale = torch.ones(8, dtype=torch.float64)
    scale[[1, 6]] = 1000
    case.weights = type(case.weights)(W_V=case.weights.W_V * scale, W_O=case.weights.W_O / scale[:, None])
    statistics = {"value_output.G": (case.v * scale).mT @ (case.v * scale)}
    result = ValueOutputSVD()(case.weights, statistics, 5, generator())
    oracle = ValueOutputSVD()(
        type(case.weights)(W_V=case.weights.W_V / scale, W_O=case.weights.W_O * scale[:, None]),
        {"value_output.G": case.v.mT @ case.v},
        5,
        generator(),
    )
    assert result.relative_error == pytest.approx(oracle.relative_error, rel=1e-9)
    difference = (case.maps(result.weights) - case.maps(oracle.weights)).norm() / case.maps().norm()
    assert float(difference) < 1e-9


@heads
@pytest.mark.parametrize("bias", [True, False])
def test_query_key_svd_is_the_optimum(heads, bias):
    case = query_key_case(heads=heads, rope=False, bias=bias)
    result = QueryKeySVD()(case.weights, case.statistics, 5, generator())
    dense, reduced = case.logits(), case.logits(result.weights)
    group = heads[0] // heads[1]
    stacked = dense.reshape(heads[1], group * dense.shape[1], dense.shape[2])
    U, S, Vh = torch.linalg.svd(stacked, full_matrices=False)
    best = (U[..., :5] * S[:, None, :5]) @ Vh[:, :5]
    torch.testing.assert_close(reduced, best.reshape(dense.shape), rtol=1e-8, atol=1e-9)
    dropped = float(S[:, 5:].square().sum() / S.square().sum())
    assert result.relative_error == pytest.approx(dropped, rel=1e-8)


def test_query_key_svd_equals_the_root_form():
    case = query_key_case(heads=(4, 4), rope=False)
    result = QueryKeySVD()(case.weights, case.statistics, 5, generator())
    C_root = matrix_root(case.x.mT @ case.x)
    U, S, Vh = torch.linalg.svd(C_root @ case.weights.W_Q @ case.weights.W_K.mT @ C_root)
    inverse = torch.linalg.inv(C_root)
    oracle = inverse @ (U[..., :5] * S[:, None, :5]) @ Vh[:, :5] @ inverse
    torch.testing.assert_close(result.weights.W_Q @ result.weights.W_K.mT, oracle, rtol=1e-8, atol=1e-9)


def test_query_key_svd_with_few_tokens():
    case = query_key_case(heads=(4, 2), rope=False, T=3)
    result = QueryKeySVD()(case.weights, case.statistics, 6, generator())
    assert set(result.numerics) == {"Q", "K"}
    dense = case.logits()
    assert float((case.logits(result.weights) - dense).norm() / dense.norm()) < 1e-5


def test_query_key_svd_is_refused_under_rope():
    case = query_key_case(heads=(4, 4))
    assert "RoPE" in QueryKeySVD().applicable(case.weights)
    with pytest.raises(UserError, match="RoPE"):
        QueryKeySVD()(case.weights, case.statistics, 4, generator())


@pytest.mark.parametrize("gated", [True, False])
def test_mlp_svd_is_the_best_factorisation_within_the_parameters(gated):
    case = mlp_case(gated=gated, bias=True)
    d_h, n, width = 10, 24, 15
    result = MLPSVD()(case.weights, case.statistics, width, generator())
    lost, total = 0.0, 0.0
    for name in ("W_U", "W_G", "W_D"):
        W, factors = getattr(case.weights, name), getattr(result.weights, name)
        if W is None:
            assert factors is None
            continue
        assert isinstance(factors, LowRank) and factors.shape == W.shape
        r = factors.A.shape[1]
        assert factors.A.numel() + factors.B.numel() <= width * d_h < (r + 1) * (d_h + n)
        S = torch.linalg.svdvals(W)
        error = (W - factors.A @ factors.B).square().sum()
        assert float(error) == pytest.approx(float(S[r:].square().sum()), rel=1e-10)
        lost, total = lost + float(error), total + float(W.square().sum())
    assert result.relative_error == pytest.approx(lost / total, rel=1e-10)
    assert result.weights.b_U is case.weights.b_U and result.weights.b_D is case.weights.b_D


def test_mlp_svd_refusals():
    case = mlp_case()
    with pytest.raises(UserError, match="no rank"):
        MLPSVD()(case.weights, case.statistics, 2, generator())
    factored = MLPSVD()(case.weights, case.statistics, 15, generator()).weights
    with pytest.raises(UserError, match="already stored as low-rank"):
        MLPSVD()(factored, case.statistics, 12, generator())
