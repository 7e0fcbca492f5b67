"""Structured OBC: each removal is the cheapest, its cost is what the least-squares optimum rises by, all add up."""

import pytest
import torch

from modegpt.decompositions.elimination import eliminate
from modegpt.errors import UserError
from modegpt.methods.obc import BLOCK, StructuredOBC, damped, eliminate_blocks, refitted, rising, statistics_read
from modegpt.methods.structures import LayerWeights, StructureSizes
from modegpt.models import decoder_layers, dense_shape
from tests.methods.protocol_checks import (
    FORMS,
    check_compression,
    check_generating,
    check_saved_and_generating,
    check_zero_sparsity,
)
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model


def hessian(size: int) -> torch.Tensor:
    X = torch.randn(200, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64)
    return damped(X.T @ X, 0.01)


def least_error(H: torch.Tensor, W: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """``min_B tr((W - B)^T H (W - B))`` over B that is zero outside ``kept``, by the normal equations."""
    B = torch.zeros_like(W)
    B[kept] = torch.linalg.solve(H[kept][:, kept], H[kept] @ W)
    return ((W - B) * (H @ (W - B))).sum()


def test_every_removal_is_the_cheapest_and_costs_what_the_optimum_rises_by():
    H, W = hessian(12), torch.randn(12, 7, dtype=torch.float64)
    order, costs = eliminate_blocks(H, W, num_blocks=4)
    alive, error = torch.ones(12, dtype=torch.bool), 0.0
    for j, cost in zip(order.tolist(), costs.tolist(), strict=True):
        rises = {}
        for block in range(4):
            if alive[3 * block]:
                without = alive.clone()
                without[3 * block : 3 * block + 3] = False
                rises[block] = least_error(H, W, without).item() - error
        assert j == min(rises, key=rises.__getitem__)
        assert cost == pytest.approx(rises[j], rel=1e-7)
        alive[3 * j : 3 * j + 3] = False
        error += cost
    assert error == pytest.approx((W * (H @ W)).sum().item(), rel=1e-9), "without any structure all energy is lost"


def test_blocks_of_one_row_go_as_channels_do():
    H, W = hessian(9), torch.randn(9, 5, dtype=torch.float64)
    for ours, theirs in zip(eliminate_blocks(H, W, 9), eliminate(H, W, 0, ridge=0.0, block=BLOCK), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_update_is_the_least_squares_optimum():
    H, W = hessian(10), torch.randn(10, 6, dtype=torch.float64)
    kept = torch.arange(10) % 3 != 0
    B = refitted(H, W, kept)
    assert torch.equal(B[~kept], W[~kept]), "what goes is as it was"
    B = B * kept.unsqueeze(1)
    assert ((W - B) * (H @ (W - B))).sum().item() == pytest.approx(least_error(H, W, kept).item(), rel=1e-9)
    torch.testing.assert_close((H @ (W - B))[kept], torch.zeros_like(W[kept]), atol=1e-9 * H.max().item(), rtol=0)


def test_hull_of_costs_never_falls_and_never_lies_above():
    costs = torch.tensor([3.0, 1.0, 2.0, 2.5, 9.0, 4.0], dtype=torch.float64)
    slopes = rising(costs)
    assert slopes.tolist() == [2.0, 2.0, 2.0, 2.5, 6.5, 6.5]
    assert (slopes.cumsum(0) <= costs.cumsum(0)).all() and slopes.sum() == costs.sum()
    assert torch.equal(rising(costs.sort().values), costs.sort().values)


def test_what_goes_is_the_beginning_of_each_order_and_the_cheapest_share_of_the_model():
    model = dense_model("llama").double()
    task = task_of(model, 0.35)
    compressed = StructuredOBC().compress(task)
    shape, layers = dense_shape(model.config), decoder_layers(model)
    size = StructureSizes.of(task.family, layers[0], shape)
    steps = []
    for index, (layer, small, statistics) in enumerate(
        zip(
            layers,
            decoder_layers(compressed.model),
            task.calibration.statistics(statistics_read(task.family)),
            strict=True,
        )
    ):
        weights = LayerWeights.read(task.family, layer)
        H_o, H = damped(statistics["value_output.C_o"], 0.01), damped(statistics["mlp.C"], 0.01)
        groups = eliminate_blocks(H_o, weights.value_output.W_O.flatten(0, 1), shape.num_kv_heads)
        channels = eliminate(H, weights.mlp.W_D, 0, ridge=0.0, block=BLOCK)
        width = compressed.layers[index]["ranks"]["mlp"]
        kept = torch.ones(shape.intermediate_size, dtype=torch.bool)
        kept[channels[0][: shape.intermediate_size - width]] = False
        assert torch.equal(task.family.up(small).weight, task.family.up(layer).weight[kept])
        torch.testing.assert_close(task.family.down(small).weight.T, refitted(H, weights.mlp.W_D, kept)[kept])
        for (_, costs), weight, left in (
            (groups, size.group, compressed.layers[index]["ranks"]["num_kv_heads"]),
            (channels, size.channel, width),
        ):
            slopes = (rising(costs / costs.sum()) / weight).tolist()
            gone = len(slopes) - left
            steps += [(slope, weight, number < gone) for number, slope in enumerate(slopes)]
    dearest = max(slope for slope, _, gone in steps if gone)
    passed_over = [weight for slope, weight, gone in steps if slope < dearest and not gone]
    assert all(weight == size.group for weight in passed_over), "a cheaper channel is never passed over"
    assert len({layer["ranks"]["mlp"] for layer in compressed.layers}) > 1, "the order is of the whole model"


def test_experts_lose_channels_together_each_its_own_in_its_order():
    model = dense_model("mixtral").double()
    task = task_of(model, 0.35, num_samples=30)
    compressed = StructuredOBC().compress(task)
    layers = zip(decoder_layers(model), decoder_layers(compressed.model), compressed.layers, strict=True)
    observed = task.calibration.statistics(statistics_read(task.family))
    sets = set()
    for (layer, small, report), statistics in zip(layers, observed, strict=True):
        gone = 40 - report["ranks"]["mlp"]
        for index, (whole, cut) in enumerate(zip(layer.mlp.experts, small.mlp.experts, strict=True)):
            H, W_D = damped(statistics["experts.C"][index], 0.01), whole.down_proj.weight.T
            order, _ = eliminate(H, W_D, 0, ridge=0.0, block=BLOCK)
            kept = torch.ones(40, dtype=torch.bool).index_fill(0, order[:gone], False)
            assert torch.equal(cut.up_proj.weight, whole.up_proj.weight[kept])
            torch.testing.assert_close(cut.down_proj.weight.T, refitted(H, W_D, kept)[kept])
            sets.add(tuple(kept.tolist()))
    assert len(sets) == 12


def test_damping_must_be_positive():
    with pytest.raises(UserError, match=r"method.damping=0\.0 must be positive"):
        StructuredOBC(damping=0.0)


@pytest.mark.parametrize("form", FORMS)
def test_protocol(form: str):
    check_zero_sparsity(StructuredOBC(), form)
    check_compression(StructuredOBC(), form, 0.3, tolerance=0.01)


def test_nearly_everything_can_go():
    check_generating(check_compression(StructuredOBC(), "llama", 0.97, tolerance=0.01).model)


def test_saved_and_generating(tmp_path):
    check_saved_and_generating(StructuredOBC(), "llama", 0.4, tmp_path / "llama")
    check_saved_and_generating(StructuredOBC(), "opt", 0.4, tmp_path / "opt")
