"""LLM-Pruner: the Taylor score is a derivative of the loss, and what scores lowest goes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from modegpt.calibration.gradients import summed_loss, weight_gradients
from modegpt.errors import UserError
from modegpt.methods.llm_pruner import ATTENTION, LLMPruner, by_structure, keep_best, structure_scores, taylor
from modegpt.methods.low_rank import block_linears
from modegpt.methods.structures import Kept, StructureSizes, pruned_model
from modegpt.models import block_linear_parameters, decoder_layers
from modegpt.models.modeling_modegpt import Experts
from tests.methods.protocol_checks import (
    FORMS,
    achieved_sparsity,
    check_compression,
    check_saved_and_generating,
    check_zero_sparsity,
)
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model, tokens

NO_PROTECTION = {"protect_first": 0.0, "protect_last": 0.0}


def loss_of(model, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return (summed_loss(model, ids) / (ids.shape[0] * (ids.shape[1] - 1))).item()


def gradients_of(task, layer) -> tuple[dict, dict]:
    linears = block_linears(task.family, layer)
    weights: list[Any] = [linear.weight for linear in linears.values()]
    gradients = weight_gradients(task.calibration, weights, batch_size=3)
    return {role: linear.weight.detach() for role, linear in linears.items()}, dict(
        zip(linears, gradients, strict=True)
    )


def test_loss_is_the_models_own():
    model = dense_model("llama")
    with torch.no_grad():
        assert loss_of(model, tokens()) == pytest.approx(model(tokens(), labels=tokens()).loss.item(), rel=1e-6)


@pytest.mark.parametrize("form", ["llama", "opt"])
def test_vector_score_is_the_finite_difference_of_shrinking_a_structure(form: str):
    model = dense_model(form).double()
    task = task_of(model, 0.3, num_samples=4)
    layer = decoder_layers(model)[1]
    weights, gradients = gradients_of(task, layer)
    num_groups = task.family.key(layer).out_features // 8
    # Llama's norm rounds to float32 whatever the model's dtype: the step must be wide enough to see past it.
    width, tolerance = (1e-3, 1e-3) if form == "llama" else (1e-5, 1e-6)
    for role in weights:
        num_structures = num_groups if role in ATTENTION else 40
        scores = taylor(
            by_structure(weights[role], role, num_structures),
            by_structure(gradients[role], role, num_structures),
            "vector",
        )
        assert scores.shape == (num_structures,)
        for structure in (0, num_structures - 1):
            losses = []
            for step in (-width, width):
                scale = torch.ones(num_structures, dtype=torch.float64)
                scale[structure] += step
                side = -1 if role in ("output", "down") else 0
                elements = scale.repeat_interleave(weights[role].shape[side] // num_structures)
                original = weights[role].clone()
                weights[role].mul_(elements if side == -1 else elements[:, None])
                losses.append(loss_of(model, task.calibration.tokens.ids))
                weights[role].copy_(original)
            derivative = abs(losses[1] - losses[0]) / (2 * width)
            assert scores[structure].item() == pytest.approx(derivative, rel=tolerance, abs=0.1 * tolerance), (
                role,
                structure,
            )


def test_element_score_sums_each_weights_finite_difference():
    model = dense_model("opt").double()
    task = task_of(model, 0.3, num_samples=2, sequence_length=8)
    layer = decoder_layers(model)[0]
    weights, gradients = gradients_of(task, layer)
    down = weights["down"]
    total = 0.0
    for row in range(len(down)):
        original, losses = down[row, 5].item(), []
        for step in (-1e-6, 1e-6):
            down[row, 5] = original + step
            losses.append(loss_of(model, task.calibration.tokens.ids))
        down[row, 5] = original
        total += abs(original * (losses[1] - losses[0]) / 2e-6)
    scores = taylor(by_structure(down, "down", 40), by_structure(gradients["down"], "down", 40), "element")
    assert scores[5].item() == pytest.approx(total, rel=1e-5)


def test_gradients_do_not_depend_on_the_micro_batches():
    model = dense_model("qwen2").double()
    weights = [block_linears(task_of(model, 0.3).family, layer)["gate"].weight for layer in decoder_layers(model)]
    ids = task_of(model, 0.3).calibration.tokens.ids
    whole = torch.autograd.grad(model(ids, labels=ids).loss, weights)
    for batch_size in (1, 3, 8):
        gradients = weight_gradients(task_of(model, 0.3).calibration, weights, batch_size=batch_size)
        torch.testing.assert_close(gradients, list(whole), rtol=1e-4, atol=1e-7)


def test_gradients_flow_though_the_model_is_frozen():
    model = dense_model("llama").requires_grad_(False)
    task = task_of(model, 0.3)
    compressed = LLMPruner().compress(task)
    assert achieved_sparsity(compressed, model) > 0.25 and not any(
        parameter.requires_grad for parameter in model.parameters()
    )


@pytest.mark.parametrize("aggregation", ["sum", "product", "max", "last"])
def test_aggregations_join_the_matrices_of_a_structure(aggregation: str):
    weights = {role: torch.rand(4, 6) if role != "down" else torch.rand(6, 4) for role in ("up", "gate", "down")}
    gradients = {role: torch.rand_like(weight) for role, weight in weights.items()}
    rows = [(weights[role] * gradients[role]).double() for role in ("up", "gate")] + [
        (weights["down"] * gradients["down"]).double().T
    ]
    each = torch.stack([row.sum(dim=1) for row in rows])
    expected = {"sum": each.sum(0), "product": each.prod(0).log(), "max": each.amax(0), "last": each[2]}[aggregation]
    scores = structure_scores(weights, gradients, ("up", "gate", "down"), 4, "element", aggregation)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("importance", "aggregation"), [("element", "sum"), ("vector", "max"), ("element", "last")])
def test_what_is_removed_scores_lowest(importance: Any, aggregation: Any):
    """Channels and heads alike, joined as the options say."""
    model = dense_model("llama", num_key_value_heads=4)
    method = LLMPruner(**NO_PROTECTION, batch_size=3, importance=importance, aggregation=aggregation)
    compressed = method.compress(task_of(model, 0.5))
    for dense, small in zip(decoder_layers(model), decoder_layers(compressed.model), strict=True):
        weights, gradients = gradients_of(task_of(model, 0.5), dense)

        def best(roles: tuple[str, ...], count: int, left: int, weights=weights, gradients=gradients) -> Tensor:
            scores = structure_scores(weights, gradients, roles, count, importance, aggregation)
            return scores.argsort()[count - left :].sort().values

        kept = best(("up", "gate", "down"), 40, small.mlp.up_proj.out_features)
        assert torch.equal(small.mlp.up_proj.weight, dense.mlp.up_proj.weight[kept])
        assert torch.equal(small.mlp.down_proj.weight, dense.mlp.down_proj.weight[:, kept])
        heads = best(("query", "key", "value", "output"), 4, 2)
        for role in ("q_proj", "k_proj"):
            rows, whole = (getattr(layer.self_attn, role).weight for layer in (small, dense))
            assert torch.equal(rows, whole.unflatten(0, (4, -1))[heads].flatten(0, 1))


@pytest.mark.parametrize("form", ["llama", "llama-multihead-biased", "qwen3", "opt"])
def test_pruned_model_equals_the_dense_one_with_structures_silenced(form: str):
    model = dense_model(form)
    task = task_of(model, 0.3)
    family = task.family
    kept: list[Any] = []
    for layer in decoder_layers(model):
        num_groups = family.key(layer).out_features // family.attention(layer).head_dim
        kept.append(Kept(torch.arange(num_groups) % 2 == len(kept) % 2, torch.rand(40) > 0.4))
    small = pruned_model(task, kept).model
    with torch.no_grad():
        ours = small(tokens()).logits
        for layer, of_layer in zip(decoder_layers(model), kept, strict=True):
            columns = family.output(layer).in_features // len(of_layer.groups)
            family.output(layer).weight[:, ~of_layer.groups.repeat_interleave(columns)] = 0
            family.down(layer).weight[:, ~of_layer.channels] = 0
        torch.testing.assert_close(ours, model(tokens()).logits, rtol=1e-4, atol=1e-5)


def test_every_expert_loses_its_own_channels_of_least_importance_and_as_many():
    model = dense_model("qwen3_moe")
    method = LLMPruner(**NO_PROTECTION, batch_size=3)
    compressed = method.compress(task_of(model, 0.4))
    assert achieved_sparsity(compressed, model) == pytest.approx(0.4, abs=0.01)
    kept = set()
    for dense, small in zip(decoder_layers(model), decoder_layers(compressed.model), strict=True):
        weights, gradients = gradients_of(task_of(model, 0.4), dense)
        for index, (whole, cut) in enumerate(zip(dense.mlp.experts, small.mlp.experts, strict=True)):
            width = small.mlp.experts[0].down_proj.in_features
            roles = tuple(f"{role}.{index}" for role in ("up", "gate", "down"))
            scores = structure_scores(weights, gradients, roles, 40, "element", "sum")
            best = scores.argsort()[40 - width :].sort().values
            kept.add(tuple(best.tolist()))
            assert torch.equal(cut.down_proj.weight, whole.down_proj.weight[:, best])
            assert torch.equal(cut.gate_proj.weight, whole.gate_proj.weight[best])
    assert len(kept) == 12, "channels of their own"


def test_experts_that_no_window_reaches_have_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    routed = Experts.routed
    monkeypatch.setattr(
        Experts, "routed", lambda self, *routing: (each for each in routed(self, *routing) if each[0] != 3)
    )
    model = dense_model("mixtral")
    _, gradients = gradients_of(task_of(model, 0.3), decoder_layers(model)[0])
    assert not gradients["down.3"].any() and gradients["down.2"].any()
    assert achieved_sparsity(LLMPruner().compress(task_of(model, 0.3)), model) == pytest.approx(0.3, abs=0.01)


def test_best_of_a_layer_within_its_budget():
    sizes = StructureSizes(group=100, channel=5)
    kept = keep_best(torch.tensor([3.0, 1.0, 2.0, 4.0]), torch.arange(40.0), sizes, budget=300)
    assert kept.groups.tolist() == [True, False, False, True] and kept.channels.tolist() == [False] * 20 + [True] * 20
    kept = keep_best(torch.tensor([3.0, 1.0]), torch.arange(40.0), sizes, budget=399)
    assert kept.groups.tolist() == [True, False] and int(kept.channels.sum()) == 1, "something of each stays"


def test_protected_layers_stay_and_the_others_pay():
    model = dense_model("llama", num_hidden_layers=5)
    compressed = LLMPruner(protect_first=0.2, protect_last=0.25).compress(task_of(model, 0.4))
    widths = [layer["ranks"]["mlp"] for layer in compressed.layers]
    assert widths[0] == widths[4] == 40 and all(width < 40 for width in widths[1:4])
    assert achieved_sparsity(compressed, model) == pytest.approx(0.4, abs=96 / block_linear_parameters(model) + 1e-9)
    assert LLMPruner().pruned_layers(32, 0.2) == range(3, 31), "the paper's layers"
    with pytest.raises(UserError, match="prunes 3 of 5 layers"):
        LLMPruner(protect_first=0.2, protect_last=0.25).compress(task_of(model, 0.7))
    with pytest.raises(UserError, match="protect_first"):
        LLMPruner(protect_first=0.6, protect_last=0.5)
    with pytest.raises(UserError, match="batch_size"):
        LLMPruner(batch_size=0)


def test_passes_are_counted():
    task = task_of(dense_model("llama"), 0.3)
    LLMPruner().compress(task)
    meter = task.calibration.meter
    assert meter.forward_passes == pytest.approx(1) and meter.backward_passes == pytest.approx(1)
    assert meter.calibration_tokens == 160 and meter.stages["gradients"].flops > 0


@pytest.mark.parametrize("form", FORMS)
def test_protocol(form: str):
    check_zero_sparsity(LLMPruner(), form)
    check_compression(LLMPruner(**NO_PROTECTION), form, 0.3, tolerance=0.01)


def test_saved_and_generating(tmp_path):
    check_saved_and_generating(LLMPruner(importance="vector"), "llama", 0.4, tmp_path)
