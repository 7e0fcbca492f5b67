"""The norm of heads that lost dims: the fits against brute force on the states themselves, in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modegpt.decompositions import QueryKeyCR, QueryKeyRandom
from modegpt.decompositions.attention import AttentionStates
from modegpt.decompositions.head_norm import PAIR_RIDGE, _each, _fit, fit_head_norm, norm_shares, share_factors
from modegpt.decompositions.modules import HEAD_NORM_FITS, HeadNorm, Sizes
from modegpt.errors import UserError
from tests.decompositions.cases import generator, normal, query_key_case

T, H, D, EPS = 400, 3, 12, 0.01
PAIRS = torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5], [0, 1, 2, 3]])


def dense_norm(*, joint: bool = False) -> HeadNorm:
    """RMSNorm over each head, or over all at once."""
    count, span = (1, H * D) if joint else (H, D)
    w = 1 + 0.3 * normal(H, D, seed=1)
    return HeadNorm(w=w, c=torch.full_like(w, 1 / span), eps=torch.full((count,), EPS, dtype=torch.float64))


def states() -> Tensor:
    """(T, H, D) whose energies follow a common loudness, which differs much from token to token, and their own."""
    loudness = torch.exp(0.8 * normal(T, 1, 1, seed=2))
    return loudness * normal(T, H, D, seed=3) * torch.logspace(0, -0.7, D, dtype=torch.float64) + normal(
        1, H, D, seed=4
    )


def gram(x: Tensor, norm: HeadNorm) -> Tensor:
    shares = norm_shares(x, norm)
    return torch.einsum("tgi,tgj->gij", shares, shares)


def mean_squares(x: Tensor, norm: HeadNorm) -> Tensor:
    """What each norm divides by the root of, (T, G)."""
    energies = (norm.c * x.square()).sum(dim=-1)
    return (energies.sum(dim=-1, keepdim=True) if len(norm.eps) == 1 else energies) + norm.eps


def kept(x: Tensor) -> Tensor:
    """(T, H, 2 k)."""
    return x.gather(-1, torch.cat([PAIRS, PAIRS + D // 2], dim=1).expand(len(x), -1, -1))


def relative_error(x: Tensor, dense: HeadNorm, fitted: HeadNorm) -> Tensor:
    return (mean_squares(kept(x), fitted) / mean_squares(x, dense) - 1).square().mean(dim=0)


@pytest.mark.parametrize("joint", [False, True], ids=["each head", "all heads"])
def test_a_factor_and_an_offset_are_those_of_least_relative_squares(joint: bool) -> None:
    x, norm = states(), dense_norm(joint=joint)
    fitted, error = fit_head_norm(norm, gram(x, norm), PAIRS, "offset")
    n, left = (
        mean_squares(x, norm),
        mean_squares(kept(x), replace(norm, c=norm.c[:, : 2 * PAIRS.shape[1]], eps=0 * norm.eps)),
    )
    for g in range(len(norm.eps)):
        features = torch.stack([left[:, g] / n[:, g], 1 / n[:, g]], dim=1)
        scale, offset = torch.linalg.lstsq(features, torch.ones(T, 1, dtype=torch.float64)).solution.squeeze(1)
        assert scale > 0 and offset > 0, "the case is one where both matter"
        heads = slice(None) if joint else slice(g, g + 1)
        torch.testing.assert_close(fitted.c[heads] / norm.c[0, 0], scale.expand_as(fitted.c[heads]), rtol=1e-8, atol=0)
        torch.testing.assert_close(fitted.eps[g], offset, rtol=1e-8, atol=0)
    torch.testing.assert_close(error, relative_error(x, norm, fitted), rtol=1e-8, atol=0)


def test_no_offset_is_negative() -> None:
    """Tokens whose norm is twice what is kept less a little: the factor alone then."""
    offset = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
    features = torch.stack([(1 + 0.5 * offset) / 2, offset])
    N, towards = (features @ features.T).unsqueeze(0), features.sum(dim=1).unsqueeze(0)
    fitted = _fit(N, towards, torch.ones(1, dtype=torch.float64), "offset", all_dims=1.0)
    assert fitted.flatten().tolist() == pytest.approx([float(towards[0, 0] / N[0, 0, 0]), 0.0])


def test_a_factor_for_each_pair_is_the_ridge_solution_with_nothing_negative() -> None:
    x, norm = states(), dense_norm()
    N = gram(x, norm)
    fitted, error = fit_head_norm(norm, N, PAIRS, "pairs")
    common, _ = fit_head_norm(norm, N, PAIRS, "offset")
    shares = norm_shares(x, norm)
    for h in range(H):
        index = torch.cat([PAIRS[h], torch.tensor([D // 2])])
        features = shares[:, h, index]
        start = torch.cat([common.c[h, :4] / norm.c[h, :4], common.eps[h : h + 1]])
        root = (PAIR_RIDGE * features.square().sum(dim=0)).sqrt()
        stacked = torch.cat([features, torch.diag(root)])
        target = torch.cat([torch.ones(T, dtype=torch.float64), root * start])
        found = torch.cat([fitted.c[h, :4] / norm.c[h, :4], fitted.eps[h : h + 1]])
        alive = found > 0
        expected = torch.linalg.lstsq(stacked[:, alive], target.unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(found[alive], expected, rtol=1e-6, atol=0)
        assert (found >= 0).all() and torch.equal(fitted.c[h, :4], fitted.c[h, 4:]), (
            "both dims of a pair weigh the same"
        )
    torch.testing.assert_close(error, relative_error(x, norm, fitted), rtol=1e-7, atol=0)


@pytest.mark.parametrize("wanted", [(2.5, 0.4, -0.3, 0.8), (0.2, -1.7, 3.0, -0.01), (0.5, 0.1, 0.3, 0.2)])
def test_no_factors_of_none_negative_err_less(wanted: tuple[float, ...]) -> None:
    """The conditions of Karush, Kuhn and Tucker: no slope where a factor is positive, an upward one where it is 0."""
    features, target = normal(60, 4, seed=5), torch.tensor(wanted, dtype=torch.float64)
    N, one = features.mT @ features, torch.full((1, 4), 0.5, dtype=torch.float64)
    found = _each(N, N @ target, one).squeeze(0)
    assert torch.equal(found > 0, target > 0)
    slope = N @ (found - target) + PAIR_RIDGE * N.diagonal() * (found - 0.5)
    assert slope[found > 0].abs().max() < 1e-9 and (slope[found <= 0] > 0).all() and (found >= 0).all()


@pytest.mark.parametrize("joint", [False, True], ids=["each head", "all heads"])
def test_the_norms_of_queries_and_keys_and_their_shares_are_counted(joint: bool) -> None:
    sizes = Sizes(d_h=32, n=40, H=6, H_kv=2, d=8, joint_norms=joint)
    for heads, counted in ((6, (sizes.G_Q, sizes.F_Q)), (2, (sizes.G_K, sizes.F_K))):
        w = normal(heads, 8, seed=1)
        norm = HeadNorm(w=w, c=torch.ones_like(w), eps=torch.ones(1 if joint else heads))
        assert norm_shares(normal(5, heads, 8, seed=2), norm).shape == (5, *counted)


def test_each_fit_is_at_least_as_good_as_the_simpler_one() -> None:
    x, norm = states(), dense_norm()
    error = {fit: fit_head_norm(norm, gram(x, norm), PAIRS, fit)[1] for fit in HEAD_NORM_FITS}
    assert (error["pairs"] < error["offset"]).all()
    assert (error["offset"] < error["scale"]).all()
    assert error["scale"].mean() < error["kept"].mean(), "on the whole: the kept dims' norm has the dense eps beside"


def test_the_kept_dims_alone_are_the_norm_of_a_narrower_head() -> None:
    x, norm = states(), dense_norm()
    fitted, error = fit_head_norm(norm, gram(x, norm), PAIRS, "kept")
    torch.testing.assert_close(mean_squares(kept(x), fitted), kept(x).square().mean(dim=-1) + EPS)
    torch.testing.assert_close(error, relative_error(x, norm, fitted))


@pytest.mark.parametrize("fit", ["pairs", "offset"])
def test_what_can_be_estimated_exactly_is(fit: str) -> None:
    """The removed pairs hold as much energy as the kept ones and 3 more; the norm is then one over the kept dims."""
    x, norm = states(), dense_norm()
    energy = kept(x).square().sum(dim=-1, keepdim=True) + 3
    dims = torch.cat([PAIRS, PAIRS + D // 2], dim=1)
    gone = torch.ones(H, D, dtype=torch.bool).scatter(1, dims, False)
    x = torch.where(gone, (energy / gone.sum(dim=1, keepdim=True)).sqrt(), x)
    fitted, error = fit_head_norm(norm, gram(x, norm), PAIRS, fit)
    assert float(error.max()) < 1e-10
    torch.testing.assert_close(mean_squares(kept(x), fitted), mean_squares(x, norm), rtol=1e-5, atol=0)
    torch.testing.assert_close(fitted.c, torch.full_like(fitted.c, 2 / D), rtol=1e-4, atol=0)
    torch.testing.assert_close(fitted.eps, torch.full_like(fitted.eps, 3 / D + EPS), rtol=1e-4, atol=0)


@pytest.mark.parametrize("fit", HEAD_NORM_FITS)
def test_nothing_removed_is_the_dense_norm(fit: str) -> None:
    x, norm = states(), dense_norm()
    everything = torch.arange(D // 2).expand(H, -1)
    fitted, error = fit_head_norm(norm, gram(x, norm), everything, fit)
    assert float(error.max()) < 1e-4 if fit == "scale" else float(error.max()) < 1e-12
    torch.testing.assert_close(fitted.w, norm.w)
    torch.testing.assert_close(fitted.c, norm.c, rtol=0.02 if fit == "scale" else 1e-7, atol=0)


def test_a_norm_of_one_share_a_head_is_an_rmsnorm_with_a_weight_and_an_eps_of_its_own() -> None:
    x, norm = states(), dense_norm()
    fitted, _ = fit_head_norm(norm, gram(x, norm), PAIRS, "offset")
    left, r = kept(x), 2 * PAIRS.shape[1]
    states_out = fitted.w * left * mean_squares(left, fitted).rsqrt().unsqueeze(-1)
    weight, eps = fitted.w * (r * fitted.c).rsqrt(), fitted.eps / (r * fitted.c[:, 0])
    rms = left * (left.square().mean(dim=-1) + eps).rsqrt().unsqueeze(-1)
    torch.testing.assert_close(states_out, weight * rms)


def test_the_factors_of_shares_estimate_the_norm() -> None:
    x, norm = states(), dense_norm()
    fitted, _ = fit_head_norm(norm, gram(x, norm), PAIRS, "pairs")
    ratio = (norm_shares(x, norm) * share_factors(norm, fitted, PAIRS)).sum(dim=-1)
    torch.testing.assert_close(ratio, mean_squares(kept(x), fitted) / mean_squares(x, norm))


def test_attention_states_can_have_estimated_norms() -> None:
    x, norm = states()[None], dense_norm()
    fitted, _ = fit_head_norm(norm, gram(x[0], norm), PAIRS, "pairs")
    q = (norm.w * x * mean_squares(x[0], norm)[None].rsqrt().unsqueeze(-1)).transpose(1, 2)
    shares, factors = norm_shares(x, norm).transpose(1, 2), share_factors(norm, fitted, PAIRS)
    dense = AttentionStates(q=q, k=q, v=q, bias=torch.zeros(1, 1, T, T), shares_Q=shares, shares_K=shares)
    estimated = dense.estimated(factors, factors)
    expected = fitted.w * kept(x[0]) * mean_squares(kept(x[0]), fitted).rsqrt().unsqueeze(-1)
    torch.testing.assert_close(kept(estimated.q[0].transpose(0, 1)), expected)
    torch.testing.assert_close(estimated.k, estimated.q)


@pytest.mark.parametrize("variant", [QueryKeyCR, QueryKeyRandom])
def test_selections_carry_the_norm_and_report_its_error(variant: type) -> None:
    case = query_key_case(heads=(6, 2))
    query, key = (
        HeadNorm(
            w=1 + 0.1 * normal(count, 8, seed=count),
            c=torch.full((count, 8), 1 / 8, dtype=torch.float64),
            eps=torch.full((count,), 1e-6, dtype=torch.float64),
        )
        for count in (6, 2)
    )
    weights = replace(case.weights, norm_Q=query, norm_K=key)
    Q, K = case.Q.transpose(0, 1), case.K.transpose(0, 1)
    with pytest.raises(UserError, match=r"needs the statistics query_key.N_K, query_key.N_Q"):
        variant()(weights, case.statistics, 4, generator())
    statistics = case.statistics | {"query_key.N_Q": gram(Q, query), "query_key.N_K": gram(K, key)}
    result = variant(head_norm="offset")(weights, statistics, 4, generator())
    pairs = result.kept[:, :2]
    expected, error = fit_head_norm(query, gram(Q, query), pairs.repeat_interleave(3, dim=0), "offset")
    torch.testing.assert_close(vars(result.weights.norm_Q), vars(expected))
    torch.testing.assert_close(result.weights.norm_K.w, key.w.gather(1, result.kept))
    assert result.numerics["norm_error"]["query"] == pytest.approx(float(error.mean()))
    assert result.numerics["norm_error"]["key"] > 0


def test_an_unknown_fit_is_refused() -> None:
    with pytest.raises(UserError, match="head_norm must be one of pairs, offset, scale, kept, got 'norm'"):
        QueryKeyCR(head_norm="norm")
