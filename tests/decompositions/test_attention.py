"""First-order sensitivities against finite differences, elimination against brute force, maps against the rotation."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from modegpt.calibration.statistics import rotate
from modegpt.decompositions.attention import (
    AttentionStates,
    block_map,
    eliminate_blocks,
    elimination_order,
    output_sensitivity,
)

HEADS, KEY_HEADS, SIZE, LENGTH = 4, 2, 6, 9


def states() -> AttentionStates:
    """Two windows, every query, causal, float64."""
    q, v = (torch.randn(2, HEADS, LENGTH, SIZE, dtype=torch.float64) for _ in range(2))
    k = torch.randn(2, KEY_HEADS, LENGTH, SIZE, dtype=torch.float64)
    bias = torch.full((LENGTH, LENGTH), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    return AttentionStates(q, k, v, bias)


def features(dense: AttentionStates, pairs: bool) -> Tensor:
    """(B, H, t, s, F) by definition."""
    q, k = dense.q.unsqueeze(3), dense.keys().unsqueeze(2)
    if not pairs:
        return q * k
    (q_i, q_j), (k_i, k_j) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
    return torch.cat([q_i * k_i + q_j * k_j, q_i * k_j - q_j * k_i], dim=-1)


@pytest.mark.parametrize("pairs", [False, True])
def test_sensitivity_is_the_derivative_of_the_output(pairs: bool) -> None:
    dense = states()
    c, logits, step = features(dense, pairs), dense.q @ dense.keys().mT + dense.bias, 1e-6
    changes = torch.stack(
        [
            ((logits + step * c[..., f]).softmax(-1) - (logits - step * c[..., f]).softmax(-1)) @ dense.v / (2 * step)
            for f in range(c.shape[-1])
        ]
    )
    expected = torch.einsum("fbhtm,gbhtm->hfg", changes, changes)
    torch.testing.assert_close(output_sensitivity(dense, pairs=pairs), expected, rtol=1e-6, atol=1e-7)


def test_a_shift_common_to_all_keys_costs_nothing() -> None:
    dense = states()
    dense.k[..., 0] = 1.0
    assert output_sensitivity(dense, pairs=False)[:, 0].abs().max() < 1e-13


def test_the_output_is_that_of_the_attention_and_maps_change_its_logits_alone() -> None:
    dense = states()
    T_Q, T_K = (torch.randn(count, SIZE, 4, dtype=torch.float64) for count in (HEADS, KEY_HEADS))
    for given, (query_map, key_map) in (((), (torch.eye(SIZE).double(),) * 2), ((T_Q, T_K), (T_Q, T_K))):
        q, k = dense.q @ query_map, (dense.k @ key_map).repeat_interleave(HEADS // KEY_HEADS, dim=1)
        logits = torch.einsum("bhti,bhsi->bhts", q, k).exp() * (dense.bias == 0)
        expected = torch.einsum("bhts,bhsm->bhtm", logits / logits.sum(dim=-1, keepdim=True), dense.v)
        torch.testing.assert_close(dense.output(*given), expected)


def test_what_goes_first_costs_least_and_the_cost_of_all_that_is_gone_is_known() -> None:
    M = sensitivity(6, 1)[0]
    order, lost = elimination_order(M, 5)
    assert [each.tolist() for each in elimination_order(M, 0)] == [[], []]
    for gone in range(1, 6):
        costs = {
            f: float(M[S][:, S].sum())
            for f in set(range(6)) - {*order[: gone - 1].tolist()}
            for S in [torch.tensor([*order[: gone - 1].tolist(), f])]
        }
        assert int(order[gone - 1]) == min(costs, key=costs.__getitem__)
        assert float(lost[gone - 1]) == pytest.approx(min(costs.values()))


def sensitivity(num_features: int, group: int) -> Tensor:
    x = torch.randn(group, 30, num_features, dtype=torch.float64)
    return x.mT @ x


def refitted_error(M: Tensor, kept: list[int], num_blocks: int, pairs: bool, ridge: float) -> float:
    """Least error of one query head with the blocks ``kept``, by a dense solve."""
    F = len(M)
    t = (torch.arange(F) < num_blocks).double()
    S = torch.tensor(kept + [block + num_blocks for block in kept] * pairs)
    R = torch.tensor([f for f in range(F) if f not in S.tolist()])
    rhs = M[S][:, R] @ t[R]
    return float(t[R] @ M[R][:, R] @ t[R] - rhs @ torch.linalg.solve(M[S][:, S] + ridge * M.diagonal()[S].diag(), rhs))


@pytest.mark.parametrize(("pairs", "ridge"), [(True, 0.0), (True, 0.1), (False, 0.1)])
def test_elimination_with_refit_is_the_exact_greedy_choice(pairs: bool, ridge: float) -> None:
    M = sensitivity(8, 2)
    num_blocks = 4 if pairs else 8
    alive = list(range(num_blocks))
    for num_kept in range(num_blocks - 1, 0, -1):
        errors = {
            block: sum(refitted_error(head, [b for b in alive if b != block], num_blocks, pairs, ridge) for head in M)
            for block in alive
        }
        alive.remove(min(errors, key=errors.get))
        kept, a = eliminate_blocks(M, num_kept, pairs=pairs, ridge=ridge)
        assert kept.tolist() == alive
        t = (torch.arange(8) < num_blocks).double()
        off = torch.where(torch.isin(torch.arange(8) % num_blocks, kept), a - t, -t)
        S = torch.isin(torch.arange(8) % num_blocks, kept)
        value = torch.einsum("gf,gfh,gh->", off, M, off) + ridge * (M.diagonal(dim1=1, dim2=2) * off**2)[:, S].sum()
        assert float(value) == pytest.approx(min(errors.values()), rel=1e-8)


def test_elimination_without_refit_counts_interactions() -> None:
    M = sensitivity(5, 1)
    kept, coefficients = eliminate_blocks(M, 4, pairs=False, ridge=None)
    assert kept.tolist() == sorted(set(range(5)) - {int(M[0].diagonal().argmin())}) and (coefficients == 1).all()
    opposite = torch.tensor([[4.0, -4.0, 0.0], [-4.0, 4.0, 0.0], [0.0, 0.0, 5.0]], dtype=torch.float64).unsqueeze(0)
    best = min(combinations(range(3), 2), key=lambda R: float(opposite[0][list(R)][:, list(R)].sum()))
    assert set(eliminate_blocks(opposite, 1, pairs=False, ridge=None)[0].tolist()) == set(range(3)) - set(best)


def test_rescaled_pairs_commute_with_the_rotation() -> None:
    kept, coefficients = torch.tensor([0, 2]), torch.randn(2, SIZE, dtype=torch.float64)
    T_Q, T_K = block_map(kept, coefficients, SIZE, pairs=True)
    angles = torch.randn(1, LENGTH, SIZE // 2, dtype=torch.float64).repeat(1, 1, 2)
    tables = (angles.cos(), angles.sin())
    fewer = tuple(table[..., torch.cat([kept, kept + SIZE // 2])] for table in tables)
    q = torch.randn(1, LENGTH, 1, SIZE, dtype=torch.float64)
    for T in (*T_Q, T_K):
        torch.testing.assert_close(rotate(q @ T, fewer), rotate(q, tables) @ T)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_map_makes_the_logits_of_the_coefficients(pairs: bool) -> None:
    dense = states()
    blocks = SIZE // 2 if pairs else SIZE
    kept, coefficients = torch.arange(blocks)[1:], torch.randn(HEADS // KEY_HEADS, SIZE, dtype=torch.float64)
    maps = [block_map(kept, coefficients, SIZE, pairs=pairs) for _ in range(KEY_HEADS)]
    T_Q, T_K = torch.cat([T for T, _ in maps]), torch.stack([T for _, T in maps])
    logits = (dense.q @ T_Q) @ (dense.k @ T_K).repeat_interleave(HEADS // KEY_HEADS, dim=1).mT
    mask = torch.isin(torch.arange(SIZE) % blocks, kept) * coefficients.repeat(KEY_HEADS, 1)
    torch.testing.assert_close(logits, torch.einsum("bhtsf,hf->bhts", features(dense, pairs), mask))
