"""First-order sensitivities against finite differences, elimination against brute force."""

import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from modegpt.decompositions.attention import AttentionStates, elimination_order, output_sensitivity

HEADS, KEY_HEADS, SIZE, LENGTH = 4, 2, 6, 9


def states() -> AttentionStates:
    """Two windows, every query, causal, float64."""
    q, v = (torch.randn(2, HEADS, LENGTH, SIZE, dtype=torch.float64) for _ in range(2))
    k = torch.randn(2, KEY_HEADS, LENGTH, SIZE, dtype=torch.float64)
    bias = torch.full((LENGTH, LENGTH), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    return AttentionStates(q, k, v, bias)


def shares(dense: AttentionStates, pairs: bool) -> Tensor:
    """(B, H, t, s, b): of each block in the logits, by definition."""
    products = dense.q.unsqueeze(3) * dense.keys().unsqueeze(2)
    return products[..., : SIZE // 2] + products[..., SIZE // 2 :] if pairs else products


@pytest.mark.parametrize("pairs", [False, True])
def test_sensitivity_is_the_derivative_of_the_output(pairs: bool) -> None:
    dense = states()
    c, logits, step = shares(dense, pairs), dense.q @ dense.keys().mT + dense.bias, 1e-6
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
    x = torch.randn(30, 6, dtype=torch.float64)
    M = x.mT @ x
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


def test_heads_take_their_steps_together_and_nothing_waits_for_a_device() -> None:
    x = torch.randn(2, 3, 30, 6, dtype=torch.float64)
    M = x.mT @ x
    orders, lost = elimination_order(M, 4)
    for group, head in itertools.product(range(2), range(3)):
        order, own = elimination_order(M[group, head], 4)
        assert torch.equal(orders[group, head], order) and torch.equal(lost[group, head], own)
    with FakeTensorMode():  # which has no values to wait for
        assert elimination_order(torch.empty(3, 6, 6), 4)[0].shape == (3, 4)


def test_blocks_that_make_up_for_each_other_go_together() -> None:
    opposite = torch.tensor([[4.0, -4.0, 0.0], [-4.0, 4.0, 0.0], [0.0, 0.0, 4.5]], dtype=torch.float64)
    order, lost = elimination_order(opposite, 2)
    assert sorted(order.tolist()) == [0, 1] and lost.tolist() == [4.0, 0.0]
