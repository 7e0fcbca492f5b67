"""What removing a module's dims does to the predictions, measured: the same for half-precision weights as for their
float32 copies.
"""

import copy
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modegpt.allocation.policies import Uniform
from modegpt.calibration.stream import Storage
from modegpt.decompositions import MLPElimination, QueryKeyCR
from modegpt.decompositions.experts import REQUIRED, reduce_experts
from modegpt.methods.divergence import Predictions, acting_as, float32_forward, kl_divergence
from modegpt.methods.modegpt import MoDeGPT
from modegpt.methods.plus import sensitivity
from modegpt.methods.plus.sensitivity import (
    SMALLEST,
    Costs,
    compared_positions,
    curve_statistics,
    curve_windows,
    measured_windows,
    perturbed_passes,
    rank_costs,
)
from modegpt.methods.prospects import PROSPECTS, mlp_prospect, query_key_prospect, value_output_prospect
from modegpt.models import decoder_layers, dense_shape, read_mlp, read_mlps, read_query_key, read_value_output
from modegpt.models.checkpoints import load_model
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model, tokens

STATISTICS = {
    "mlp": frozenset({"mlp.C"}),
    "query_key": frozenset({"query_key.C_Q", "query_key.C_K"}),
    "value_output": frozenset({"value_output.A"}),
}
SHARES = (0.25, 0.5)


def costs(model: PreTrainedModel) -> Costs:
    return rank_costs(task_of(model, 0.3, num_samples=48).calibration, STATISTICS, SHARES, ())


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-llama"])
def test_half_precision_does_not_drown_small_divergences(name: str) -> None:
    half = load_model(f"embedded:{name}", dtype=torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in half.state_dict().items()}
    single = copy.deepcopy(half).float()
    for of_half, of_single in zip(costs(half), costs(single), strict=True):
        for module, curve in of_single.items():
            for share in SHARES:
                k = round(share * (len(curve) - 1))
                assert of_half[module][k] == pytest.approx(curve[k], rel=0.2), (module, share)
    after = half.state_dict()
    assert all(after[key].dtype == tensor.dtype and torch.equal(after[key], tensor) for key, tensor in before.items())


def test_weights_are_narrow_again_after_a_failure() -> None:
    model = load_model("embedded:tiny-llama", dtype=torch.bfloat16)
    with pytest.raises(IndexError), float32_forward(model):
        model(torch.tensor([[10**6]]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_wide_model_runs_as_it_is() -> None:
    model = load_model("embedded:tiny-llama")
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad(), float32_forward(model):
        inside = model(ids).logits
        assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(inside, model(ids).logits)


@pytest.mark.parametrize("distance", [1e-6, 1e-4, 1e-2, 1.0])
def test_divergence_of_predictions_is_exact_however_small(distance: float) -> None:
    """From float32 log probabilities as from float64 ones, down to what the rounding of the former is itself."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(50, 300, generator=generator, dtype=torch.float64)
    moved = logits + distance * torch.randn(50, 300, generator=generator, dtype=torch.float64)
    log_p, log_q = logits.log_softmax(-1), moved.log_softmax(-1)
    truth = float((log_p.exp() * (log_p - log_q)).sum())
    assert kl_divergence(Predictions.of(log_p), log_q) == pytest.approx(truth, rel=1e-4)
    single = kl_divergence(Predictions.of(log_p.float()), log_q.float())
    assert single == pytest.approx(truth, rel=1e-2, abs=50 * SMALLEST)


def test_divergence_of_equal_predictions_is_nothing() -> None:
    log_p = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert kl_divergence(Predictions.of(log_p), log_p) == 0.0


@pytest.mark.parametrize(
    ("windows", "length", "num_layers", "measured"),
    [
        (128, 256, 6, (4, 256)),  # 1024 tokens cost half a pass
        (128, 512, 5, (3, 512)),  # three windows cost three eighths of a pass, and are more than 1024 tokens
        (32, 512, 30, (1, 273)),  # 1024 tokens would cost more than 5 passes
        (8, 2048, 30, (1, 273)),
        (64, 512, 30, (1, 512)),  # two would cost almost three passes
        (8, 256, 6, (1, 256)),  # not fewer than 256 tokens
        (128, 2048, 32, (1, 1024)),
        (2, 64, 6, (2, 64)),  # all there is
    ],
)
def test_measurements_cost_about_a_pass_and_a_half_at_most(
    windows: int, length: int, num_layers: int, measured: tuple[int, int]
) -> None:
    ids = torch.arange(windows * length).view(windows, length)
    chosen = measured_windows(ids, num_layers=num_layers)
    assert chosen.shape == measured and torch.equal(chosen, ids[: measured[0], : measured[1]])
    passes = 2 * len(STATISTICS) * num_layers / 2 * chosen.numel() / ids.numel()
    assert passes <= 1.5 or chosen.numel() <= 256


def test_a_large_vocabulary_is_compared_at_some_positions() -> None:
    measured = torch.zeros(2, 300, dtype=torch.long)
    assert compared_positions(measured, vocabulary=1536) is None
    positions = compared_positions(measured, vocabulary=50_000)
    assert len(positions) == 64 and positions[-1] == 299 and (positions >= 0).all()
    assert set(positions.diff().tolist()) <= {4, 5}


def test_divergences_at_some_positions_are_those_of_these_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """One measurement by hand: the model with the reduced module, at the compared positions of whole windows."""
    model = load_model("embedded:tiny-llama")
    calibration = task_of(model, 0.3, num_samples=48).calibration
    monkeypatch.setattr(sensitivity, "MOST_ENTRIES", 1)  # 128 predictions
    seen: dict[int, Any] = {}
    monkeypatch.setattr(sensitivity, "expected", lambda curve, points: seen.setdefault(len(seen), points))
    costs = rank_costs(calibration, {"mlp": STATISTICS["mlp"]}, (0.5,), ())
    assert len(costs) == 6
    [(removed, divergence)] = seen[0].items()
    measured = measured_windows(calibration.tokens.ids, num_layers=6)
    positions = compared_positions(measured, vocabulary=1536)
    layer = decoder_layers(model)[0]
    some = replace(calibration.tokens, ids=calibration.tokens.ids[: sensitivity.curve_windows(calibration)])
    [statistics] = itertools.islice(replace(calibration, tokens=some, cache=None).statistics(STATISTICS["mlp"]), 1)
    down: Any
    [(down, reduced)] = mlp_prospect(calibration.family, layer, statistics).map(removed)
    with torch.no_grad():
        dense = model(measured).logits[:, positions].double().log_softmax(-1)
        down.weight.copy_(reduced(torch.eye(down.weight.shape[1])).T)
        moved = model(measured).logits[:, positions].double().log_softmax(-1)
    assert dense.shape[:2] == (12, 11)
    assert divergence == pytest.approx(float((dense.exp() * (dense - moved)).sum() / 132), rel=1e-3)


def test_every_share_of_every_module_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by hand, by the model with what stands in for the module."""
    model, index = load_model("embedded:tiny-llama"), 3
    calibration = task_of(model, 0.3, num_samples=48).calibration
    seen: list[dict] = []
    monkeypatch.setattr(sensitivity, "expected", lambda curve, points: seen.append(points))
    rank_costs(calibration, STATISTICS, (0.1, 0.25, 0.5), ())
    measured = measured_windows(calibration.tokens.ids, num_layers=6)
    layer = decoder_layers(model)[index]
    *_, statistics = itertools.islice(curve_statistics(calibration, STATISTICS), index + 1)
    with torch.no_grad():
        dense = model(measured).logits.double().log_softmax(-1)
    for module, points in zip(STATISTICS, seen[index * len(STATISTICS) :], strict=False):
        prospect = PROSPECTS[module](calibration.family, layer, statistics)
        assert set(points) == {prospect.removed(share) for share in (0.1, 0.25, 0.5)}
        for removed, divergence in points.items():
            with torch.no_grad(), acting_as(prospect.map(removed)):
                moved = model(measured).logits.double().log_softmax(-1)
            expected = float((dense.exp() * (dense - moved)).sum(-1).mean())
            assert divergence == pytest.approx(expected, rel=1e-2), module


class Counting(Storage):
    """Notes which layers are asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.asked: list[int] = []

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        self.asked.append(index)
        return super().layer(index)


@pytest.mark.parametrize("shares", [(0.5,), (0.1, 0.25, 0.5, 0.75)])
def test_a_layer_is_needed_once_however_much_is_measured_below_it(shares: tuple[float, ...]) -> None:
    model = load_model("embedded:tiny-llama")
    storage = Counting(model)
    calibration = replace(task_of(model, 0.3, num_samples=48).calibration, storage=storage)
    rank_costs(calibration, STATISTICS, shares, (2,))
    assert storage.asked == list(range(6))


def test_what_the_measurements_cost_is_counted() -> None:
    calibration = task_of(load_model("embedded:tiny-llama"), 0.3, num_samples=48).calibration
    measured = measured_windows(calibration.tokens.ids, num_layers=6)
    assert (
        perturbed_passes(calibration, STATISTICS, num_shares=2)
        == (1 + 6 * 7 / 2) * measured.numel() / calibration.tokens.ids.numel()
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "olmo2"])
def test_what_stands_in_for_lost_pairs_is_the_model_without_them(name: str) -> None:
    """Estimated norms included: ranks are not spent on queries and keys as if their norms cost nothing."""
    model = dense_model(name)
    task = task_of(model, 0.3)
    names = QueryKeyCR().reads(head_norms=task.family.head_norms)
    *_, statistics = itertools.islice(task.calibration.statistics(names), 2)
    method = MoDeGPT(
        mlp=None,
        query_key=QueryKeyCR(),
        value_output=None,
        allocation=Uniform(),
        module_sparsity={"query_key": 0.25},
        skip_layers=(0, 2),
    )
    compressed, size = method.compress(task).model, dense_shape(model.config).qk_head_dim
    layer = decoder_layers(model)[1]
    with torch.no_grad(), acting_as(query_key_prospect(task.family, layer, statistics).map(size // 4)):
        moved = model(tokens()).logits
    with torch.no_grad():
        expected, dense = compressed(tokens()).logits, model(tokens()).logits
    torch.testing.assert_close(moved, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert (moved - dense).abs().max() > 1e-3 * dense.abs().max()


def test_what_stands_in_for_channels_of_experts_is_the_model_without_them() -> None:
    """Of all experts together, whose errors add up; an expert needs as many tokens a channel as one MLP."""
    model = dense_model("mixtral")
    task, layer = task_of(model, 0.3, num_samples=24), decoder_layers(model)[1]
    statistics = list(task.calibration.statistics(REQUIRED))[1]
    prospect, weights = mlp_prospect(task.family, layer, statistics), read_mlps(task.family, layer)
    done = reduce_experts(MLPElimination(), weights, statistics, 25, task.generator())
    whole = 0.0
    for C, expert in zip(statistics["experts.C"], weights.experts, strict=True):
        whole += float(((C @ expert.W_D.double()) * expert.W_D).sum())
    assert prospect.curve[15] == pytest.approx(done.relative_error * whole, rel=1e-3)
    method = MoDeGPT(
        mlp=MLPElimination(),
        query_key=None,
        value_output=None,
        allocation=Uniform(),
        module_sparsity={"mlp": 15 / 40},
        skip_layers=(0, 2),
    )
    compressed = method.compress(task).model
    with torch.no_grad(), acting_as(prospect.map(15)):
        moved = model(tokens()).logits
    with torch.no_grad():
        expected = compressed(tokens()).logits
    torch.testing.assert_close(moved, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    of_one = task_of(dense_model("llama"), 0.3, num_samples=24).calibration
    assert [curve_windows(each) for each in (of_one, task.calibration)] == [8, 16], "160 and 320 of 20 tokens"


@pytest.mark.parametrize(
    ("name", "changes"), [("opt", {}), ("llama-multihead-biased", {}), ("llama", {"num_key_value_heads": 1})]
)
def test_what_stands_in_loses_what_the_curve_says_and_keeps_the_biases(name: str, changes: dict) -> None:
    """On the Grams that each curve is made of: of values or attention outputs, of channels, of queries and keys."""
    model = dense_model(name, **changes)
    task, layer = task_of(model, 0.3, num_samples=24), decoder_layers(model)[1]
    names = frozenset({"mlp.C", "value_output.A", "value_output.G", "query_key.C_Q", "query_key.C_K"})
    statistics = list(task.calibration.statistics(names))[1]
    of_values, of_keys, mlp = (read(task.family, layer) for read in (read_value_output, read_query_key, read_mlp))
    num_heads, num_groups, d = len(of_values.W_O), len(of_values.W_V), of_values.inner_size
    pooled = statistics["value_output.A"].reshape(num_groups, -1, d, d).sum(dim=1)
    for of, G in (("value_output.A", pooled), ("value_output.G", statistics["value_output.G"])):
        prospect = value_output_prospect(task.family, layer, {of: statistics[of]})
        for removed in (1, 5):
            [(linear, forward)] = prospect.map(removed)
            assert linear is task.family.output(layer)
            W, b = matrix_of(forward, num_heads * d)
            E = (of_values.W_O.flatten(0, 1).double() - W).unflatten(0, (num_groups, -1, d))
            lost = float(torch.einsum("kgdm,kde,kgem->", E, G, E))
            assert prospect.curve[removed] == pytest.approx(lost, rel=1e-3)
            if of_values.b_V is not None:
                values = of_values.b_V.repeat_interleave(num_heads // num_groups, dim=0).flatten().double()
                torch.testing.assert_close(values @ W + b, values @ linear.weight.double().T + bias_of(linear))
    prospect, C = mlp_prospect(task.family, layer, statistics), statistics["mlp.C"]
    for removed in (1, 25):
        [(linear, forward)] = prospect.map(removed)
        W, b = matrix_of(forward, len(C))
        E = mlp.W_D.double() - W
        assert prospect.curve[removed] == pytest.approx(float((E * (C @ E)).sum()), rel=1e-3)
        assert linear is task.family.down(layer) and int((W == 0).all(dim=1).sum()) == removed
        torch.testing.assert_close(b, bias_of(linear).expand_as(b))
    prospect = query_key_prospect(task.family, layer, statistics)
    if of_keys.rope:
        assert prospect.unit == 2 and prospect.curve[1] == prospect.curve[2] < prospect.curve[3] == prospect.curve[4]
    C_Q = statistics["query_key.C_Q"].reshape(num_groups, -1, d, d).sum(dim=1)
    for removed in (2, 6):
        [(linear, forward)] = prospect.map(removed)
        W, b = matrix_of(forward, model.config.hidden_size)
        gone = (W == 0).all(dim=0).reshape(num_groups, d)
        assert linear is task.family.key(layer) and gone.sum(dim=1).tolist() == [removed] * num_groups
        both = (gone.unsqueeze(2) & gone.unsqueeze(1)).double()
        assert prospect.curve[removed] == pytest.approx(
            float((both * C_Q * statistics["query_key.C_K"]).sum()), rel=1e-6
        )
        kept = ~gone.flatten()
        torch.testing.assert_close(W[:, kept], of_keys.W_K.transpose(0, 1).flatten(1).double()[:, kept])
        torch.testing.assert_close(b, bias_of(linear).expand_as(b) * kept)


def matrix_of(forward: Callable[[Tensor], Tensor], num_inputs: int) -> tuple[Tensor, Tensor]:
    """The matrix (in, out) and the bias (out,) of an affine map, float64."""
    with torch.no_grad():
        b = forward(torch.zeros(1, num_inputs)).double().squeeze(0)
        return forward(torch.eye(num_inputs)).double() - b, b


def bias_of(linear: Any) -> Tensor:
    return torch.zeros(()).double() if linear.bias is None else linear.bias.detach().double()
