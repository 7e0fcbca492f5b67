"""Experts one by one: each as its MLP alone would be, the error over all, and what few or no tokens make of one."""

import pytest
import torch
from torch import Tensor

from modegpt.decompositions import MLP_VARIANTS, MLPColumns, MLPNystrom, MLPNystromBias
from modegpt.decompositions.experts import expert_gram, experts_applicable, reduce_experts
from modegpt.decompositions.modules import ExpertWeights
from tests.decompositions.cases import MLPCase, generator, mlp_case

WIDTH, KEPT = 24, 15


def experts(*token_counts: int) -> tuple[list[MLPCase], ExpertWeights, dict[str, Tensor]]:
    """One expert a count, with its own weights and hidden states, and the statistics of a layer of 200 tokens."""
    cases = [mlp_case(T=max(count, 1), n=WIDTH, seed=10 * index) for index, count in enumerate(token_counts)]
    grams = [case.h[:count].mT @ case.h[:count] for case, count in zip(cases, token_counts, strict=True)]
    statistics = {
        "experts.C": torch.stack(grams),
        "experts.share": torch.tensor(token_counts, dtype=torch.float64) / 200,
        "layer.num_tokens": torch.tensor(200),
    }
    return cases, ExpertWeights(tuple(case.weights for case in cases)), statistics


def test_each_expert_is_reduced_as_its_mlp_alone() -> None:
    cases, weights, statistics = experts(120, 60)
    result = reduce_experts(MLPNystrom(), weights, statistics, KEPT, generator())
    lost = whole = 0.0
    for index, case in enumerate(cases):
        alone = MLPNystrom()(case.weights, case.statistics, KEPT, generator())
        assert torch.equal(result.weights.experts[index].W_D, alone.weights.W_D)
        assert torch.equal(result.kept[index], alone.kept)
        lost += float((case.h @ case.weights.W_D - case.h[:, alone.kept] @ alone.weights.W_D).square().sum())
        whole += float((case.h @ case.weights.W_D).square().sum())
    assert result.relative_error == pytest.approx(lost / whole, rel=1e-8)
    assert result.weights.inner_size == KEPT
    assert result.numerics == {"fewest_tokens": 60, "most_tokens": 120}


def test_an_expert_that_no_token_reached_is_cut_by_its_weights() -> None:
    _, weights, statistics = experts(120, 0)
    result = reduce_experts(MLPNystrom(), weights, statistics, KEPT, generator())
    unseen, cut = weights.experts[1], result.weights.experts[1]
    sizes = unseen.W_U.square().sum(dim=0) * unseen.W_G.square().sum(dim=0)
    assert result.kept[1].tolist() == sizes.topk(KEPT).indices.sort().values.tolist()
    torch.testing.assert_close(cut.W_D, unseen.W_D[result.kept[1]])
    assert result.numerics["unseen"] == [1] and result.numerics["few"] == [1]


def test_few_tokens_are_believed_as_far_as_they_go() -> None:
    """Between the slice and the refit that the few tokens alone would ask for, which fits these and nothing else."""
    cases, weights, statistics = experts(120, 12)
    result = reduce_experts(MLPNystrom(), weights, statistics, KEPT, generator())
    assert result.numerics["few"] == [1] and "unseen" not in result.numerics
    C, case = statistics["experts.C"][1], cases[1]
    filled = expert_gram(C, case.weights, 12)
    torch.testing.assert_close((filled - C).diagonal().sum(), 0.5 * C.diagonal().sum())
    assert torch.equal(filled - torch.diag(filled.diagonal()), C - torch.diag(C.diagonal()))
    fresh = mlp_case(T=400, n=WIDTH, seed=10).h[12:]
    kept, W_D = result.kept[1], result.weights.experts[1].W_D
    refit, plain = (variant()(case.weights, {"mlp.C": C}, KEPT, generator()) for variant in (MLPNystrom, MLPColumns))
    dense = fresh @ case.weights.W_D

    def error(kept: Tensor, W_D: Tensor) -> float:
        return float((dense - fresh[:, kept] @ W_D).square().sum())

    assert error(kept, W_D) < error(refit.kept, refit.weights.W_D), "the refit to few tokens alone goes too far"
    assert not torch.equal(W_D, case.weights.W_D[kept]) and plain.kept is not None


def test_enough_tokens_are_the_whole_truth() -> None:
    cases, _, statistics = experts(120)
    C = statistics["experts.C"][0]
    assert expert_gram(C, cases[0].weights, WIDTH) is C


def test_decompositions_that_need_more_are_refused() -> None:
    fit = {name for name, variant in MLP_VARIANTS.items() if experts_applicable(variant()) is None}
    assert fit == {"nystrom", "columns", "elimination", "magnitude", "random"}
    assert "choose channels by their Gram" in experts_applicable(MLPNystromBias())
