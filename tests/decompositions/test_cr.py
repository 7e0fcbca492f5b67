import dataclasses
import itertools

import pytest
import torch

from modegpt.decompositions import QueryKeyCR, QueryKeyCRPairs, QueryKeyElimination, QueryKeyShared
from modegpt.decompositions.cr import QueryKeyEliminationCentred, cr_scores, in_order
from modegpt.decompositions.selection import query_key_relative_error, sum_pairs
from modegpt.errors import UserError
from tests.decompositions.cases import HEADS, generator, matrix_root, query_key_case

heads = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())


def rotate(states: torch.Tensor) -> torch.Tensor:
    """RoPE on (heads, T, d), position = row, pairs (i, i + d/2)."""
    T, d = states.shape[1:]
    frequencies = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = torch.arange(T, dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


@heads
def test_score_equals_the_matrix_root_form(heads):
    case = query_key_case(heads=heads)
    C_Q, C_K = case.statistics["query_key.C_Q"], case.statistics["query_key.C_K"]
    group = len(C_Q) // len(C_K)
    per_head = matrix_root(C_Q).norm(dim=1) * matrix_root(C_K).norm(dim=1).repeat_interleave(group, dim=0)
    oracle = per_head.reshape(len(C_K), group, -1).square().sum(dim=1).sqrt()
    scores = cr_scores(C_Q.diagonal(dim1=-2, dim2=-1), C_K.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(scores, oracle, rtol=1e-10, atol=0)


@heads
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_slices_match_the_logits_of_the_kept_dims(heads, rope, bias):
    case = query_key_case(heads=heads, rope=rope, bias=bias)
    result = QueryKeyCR()(case.weights, case.statistics, 4, generator())
    group = len(case.Q) // len(case.K)
    oracle = torch.stack(
        [
            Q[:, kept] @ case.K[h // group][:, kept].mT
            for h, Q in enumerate(case.Q)
            for kept in [result.kept[h // group]]
        ]
    )
    torch.testing.assert_close(case.logits(result.weights), oracle)
    dense = case.logits()
    error = (dense - oracle).square().sum() / dense.square().sum()
    assert result.relative_error == pytest.approx(float(error), rel=1e-9)


@heads
def test_keeps_whole_pairs_of_the_largest_score(heads):
    case = query_key_case(heads=heads, seed=3)
    d = case.weights.inner_size
    energy_Q, energy_K = (
        C.diagonal(dim1=-2, dim2=-1) for C in (case.statistics["query_key.C_Q"], case.statistics["query_key.C_K"])
    )
    group = len(energy_Q) // len(energy_K)
    result = QueryKeyCR()(case.weights, case.statistics, 4, generator())
    for k in range(len(energy_K)):
        per_dim = (energy_Q[k * group : (k + 1) * group].sum(dim=0) * energy_K[k]).sqrt()
        best = sorted(range(d // 2), key=lambda i: -float(per_dim[i] + per_dim[i + d // 2]))[:2]
        assert result.weights.rope_index[k].tolist() == sorted(best)
        assert result.kept[k].tolist() == sorted(best) + [i + d // 2 for i in sorted(best)]


def test_heads_choose_their_own_frequencies():
    case = query_key_case(heads=(6, 2), seed=3)
    index = QueryKeyCR()(case.weights, case.statistics, 4, generator()).weights.rope_index
    assert not torch.equal(index[0], index[1])


@heads
def test_pair_score_is_rotation_invariant_and_the_dim_score_is_not(heads):
    case = query_key_case(heads=heads)
    before, after = (case.Q, case.K), (rotate(case.Q), rotate(case.K))

    def energies(states):
        return tuple(s.square().sum(dim=1) for s in states)

    torch.testing.assert_close(*(cr_scores(*map(sum_pairs, energies(s))) for s in (before, after)), rtol=1e-12, atol=0)
    dims = [sum_pairs(cr_scores(*energies(s))) for s in (before, after)]
    assert float((dims[0] / dims[1] - 1).abs().max()) > 1e-2


@heads
def test_pair_variant_keeps_the_largest_pair_scores(heads):
    case = query_key_case(heads=heads, seed=3)
    statistics = {
        "query_key.C_Q": rotate(case.Q).mT @ rotate(case.Q),
        "query_key.C_K": rotate(case.K).mT @ rotate(case.K),
    }
    chosen = QueryKeyCRPairs()(case.weights, statistics, 4, generator())
    d, group = case.weights.inner_size, len(case.Q) // len(case.K)
    for k in range(len(case.K)):
        queries, norms = case.Q[k * group : (k + 1) * group], []
        for pair in ([i, i + d // 2] for i in range(d // 2)):
            norms.append(float(queries[:, :, pair].square().sum() * case.K[k][:, pair].square().sum()))
        assert chosen.weights.rope_index[k].tolist() == sorted(sorted(range(d // 2), key=lambda i: -norms[i])[:2])
    same = QueryKeyCR(score="pairs")(case.weights, statistics, 4, generator())
    assert torch.equal(same.kept, chosen.kept)


def test_error_of_rotated_states_is_that_of_the_rotated_logits():
    case = query_key_case(heads=(6, 2))
    Q, K = rotate(case.Q), rotate(case.K)
    kept = torch.tensor([[0, 2, 4, 6], [1, 3, 5, 7]])
    dense = Q @ K.repeat_interleave(3, dim=0).mT
    reduced = torch.stack([Q[h][:, kept[h // 3]] @ K[h // 3][:, kept[h // 3]].mT for h in range(6)])
    oracle = float((dense - reduced).square().sum() / dense.square().sum())
    assert query_key_relative_error(Q.mT @ Q, K.mT @ K, kept) == pytest.approx(oracle, rel=1e-10)


def test_second_reduction_names_the_original_frequencies():
    case = query_key_case(heads=(6, 2), seed=1)
    first = QueryKeyCR()(case.weights, case.statistics, 6, generator())
    Q = torch.stack([case.Q[h][:, first.kept[h // 3]] for h in range(6)])
    K = torch.stack([case.K[k][:, first.kept[k]] for k in range(2)])
    second = QueryKeyCR()(first.weights, {"query_key.C_Q": Q.mT @ Q, "query_key.C_K": K.mT @ K}, 4, generator())
    at_once = QueryKeyCR()(case.weights, case.statistics, 4, generator())
    assert torch.equal(second.weights.rope_index, at_once.weights.rope_index)
    assert torch.equal(second.weights.W_K, at_once.weights.W_K)


def test_without_rope_single_dims_are_kept():
    case = query_key_case(heads=(4, 4), rope=False)
    result = QueryKeyCR()(case.weights, case.statistics, 3, generator())
    assert result.weights.rope_index is None and result.kept.shape == (4, 3)


def test_refusals():
    case = query_key_case(heads=(4, 4), rope=False)
    with pytest.raises(UserError, match="RoPE"):
        QueryKeyCRPairs()(case.weights, case.statistics, 4, generator())
    with pytest.raises(UserError, match="score must be one of dims, pairs"):
        QueryKeyCR(score="both")
    with pytest.raises(UserError, match="rotary pair"):
        QueryKeyCR()(query_key_case(heads=(4, 4)).weights, case.statistics, 3, generator())


def test_dead_dims_go_first():
    case = query_key_case(heads=(4, 2), rope=False)
    case.K[:, :, 2] = 0
    result = QueryKeyCR()(case.weights, case.statistics, 7, generator())
    assert (result.kept != 2).all()
    assert result.relative_error == pytest.approx(0, abs=1e-14)


@heads
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("variant", [QueryKeyElimination(), QueryKeyEliminationCentred()], ids=lambda each: each.label)
def test_elimination_drops_what_the_logits_miss_least_given_what_is_gone(heads, rope, variant):
    """Or, with keys centred, what the logits of a query miss beside the number that they all miss."""
    centred = isinstance(variant, QueryKeyEliminationCentred)
    case = query_key_case(heads=heads, rope=rope, bias=centred, seed=5)
    if centred:  # what keys have in common is large in a dim that matters little
        b_K = 4 * torch.eye(case.weights.inner_size, dtype=case.K.dtype)[0].expand_as(case.weights.b_K)
        weights = dataclasses.replace(case.weights, b_K=case.weights.b_K + b_K)
        case = dataclasses.replace(case, weights=weights, K=case.K + b_K.unsqueeze(1))
    result = variant(case.weights, case.statistics, 4, generator())
    d, group = case.weights.inner_size, len(case.Q) // len(case.K)
    dense = case.logits()

    def dims(blocks: list[int]) -> list[int]:
        return [*blocks, *(i + d // 2 for i in blocks)] if rope else blocks

    def missed(head: int, blocks: list[int]) -> float:
        queries, keys = case.Q[head * group : (head + 1) * group, :, dims(blocks)], case.K[head][:, dims(blocks)]
        lost = dense[head * group : (head + 1) * group] - queries @ keys.mT
        return float((lost - lost.mean(dim=-1, keepdim=True) if centred else lost).square().sum())

    for head in range(len(case.K)):
        alive = list(range(d // 2 if rope else d))
        for _ in range(2 if rope else 4):
            costs = {block: missed(head, [other for other in alive if other != block]) for block in alive}
            alive.remove(min(costs, key=costs.get))
        assert result.kept[head].tolist() == dims(alive)
    if centred:
        plain = QueryKeyElimination()(case.weights, case.statistics, 4, generator())
        assert not torch.equal(result.kept, plain.kept) and result.relative_error > plain.relative_error
        return
    chosen = QueryKeyCR()(case.weights, case.statistics, 4, generator())
    assert result.relative_error <= chosen.relative_error * (1 + 1e-9)
    error = (dense - case.logits(result.weights)).square().sum() / dense.square().sum()
    assert result.relative_error == pytest.approx(float(error), rel=1e-8)


@pytest.mark.parametrize(("n", "m"), [(7, 3), (5, 5), (6, 1)])
def test_the_best_choice_in_order_is_that_of_all_choices(n, m):
    gain = torch.randn(4, n, m, generator=generator(), dtype=torch.float64)
    chosen, total = in_order(gain)
    for head, each in enumerate(gain):
        ways = {way: float(each[list(way), range(m)].sum()) for way in itertools.combinations(range(n), m)}
        best = max(ways, key=ways.__getitem__)
        assert tuple(chosen[head].tolist()) == best and float(total[head]) == pytest.approx(ways[best])


@heads
def test_shared_frequencies_are_the_same_everywhere_and_pairs_move_to_them(heads):
    """Every key head has the same frequencies, its own pairs in them, and the loss that was foreseen."""
    case = query_key_case(heads=heads, d=16)
    variant = QueryKeyShared(context=32)
    result = variant(case.weights, case.statistics, 8, generator())
    assert result.weights.rope_index.tolist() == [[0, 2, 5, 7]] * len(case.K)
    C_Q, C_K = case.statistics["query_key.C_Q"], case.statistics["query_key.C_K"]
    energy = cr_scores(*(sum_pairs(C.diagonal(dim1=-2, dim2=-1)) for C in (C_Q, C_K))).square()
    w, lost = case.weights.frequencies, energy.sum()
    for head, W_K in enumerate(result.weights.W_K):
        pairs = [(case.weights.W_K[head] - column).abs().sum(0).argmin().item() for column in W_K.T.unsqueeze(-1)][:4]
        assert pairs == sorted(set(pairs))
        for pair, place in zip(pairs, (0, 2, 5, 7), strict=True):
            t = torch.arange(32, dtype=torch.float64)
            mean = (torch.cos((w[pair] - w[place]) * t) * (32 - t)).sum() / (32 - t).sum()
            lost -= energy[head, pair] * (2 * mean - 1)
    assert result.relative_error == pytest.approx(float(lost / energy.sum()))


def test_a_frequency_beyond_the_context_moves_for_nothing_and_a_short_one_not_at_all():
    """Where all frequencies are alike within the context the best pairs stay; where none are, those in their places."""
    case = query_key_case(heads=(2, 2), d=16)
    C_Q, C_K = case.statistics["query_key.C_Q"], case.statistics["query_key.C_K"]
    energy = cr_scores(*(sum_pairs(C.diagonal(dim1=-2, dim2=-1)) for C in (C_Q, C_K))).square()

    def kept(frequencies):
        weights = dataclasses.replace(case.weights, frequencies=frequencies)
        return QueryKeyShared(context=64)(weights, case.statistics, 8, generator()).relative_error

    best = energy.topk(4, dim=1).values.sum() / energy.sum()
    assert kept(torch.linspace(1e-6, 0, 8, dtype=torch.float64)) == pytest.approx(float(1 - best))
    places = energy[:, [0, 2, 5, 7]].sum() / energy.sum()
    assert kept(torch.linspace(2.8, 0, 8, dtype=torch.float64)) == pytest.approx(float(1 - places), abs=0.05)


def test_shared_frequencies_where_there_are_none():
    case = query_key_case(heads=(2, 2), rope=False)
    with pytest.raises(UserError, match="no frequencies to share without RoPE"):
        QueryKeyShared()(case.weights, case.statistics, 4, generator())
    with pytest.raises(UserError, match="context must be at least 1"):
        QueryKeyShared(context=0)
