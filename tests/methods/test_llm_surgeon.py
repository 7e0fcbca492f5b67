"""LLM Surgeon: curvature, costs and updates against brute force."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from modegpt.calibration.gradients import summed_loss
from modegpt.errors import UserError
from modegpt.methods.llm_surgeon import (
    LLMSurgeon,
    damped,
    inverse,
    observed_curvature,
    removal_costs,
    without_rows,
)
from modegpt.methods.structures import StructureSizes
from modegpt.models import decoder_layers
from tests.methods.protocol_checks import (
    FORMS,
    achieved_sparsity,
    check_compression,
    check_saved_and_generating,
    check_what_decides,
    check_zero_sparsity,
)
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model


def positive_definite(size: int) -> Tensor:
    X = torch.randn(3 * size, size, dtype=torch.float64)
    return X.T @ X / len(X)


def constrained_minimum(W: Tensor, A: Tensor, G: Tensor, rows: Tensor) -> tuple[Tensor, float]:
    """The D that minimises 1/2 vec(D)^T (A (x) G) vec(D) with D_S = -W_S, and its cost, from the whole KKT system."""
    F = torch.kron(A, G)  # row-major vec(D): entry (i, o) at i * out + o
    pinned = rows.repeat_interleave(W.shape[1]).nonzero().squeeze(1)
    E = torch.zeros(len(pinned), W.numel(), dtype=W.dtype)
    E[torch.arange(len(pinned)), pinned] = 1
    zeros = torch.zeros(len(pinned), len(pinned), dtype=W.dtype)
    system = torch.cat((torch.cat((F, E.T), dim=1), torch.cat((E, zeros), dim=1)))
    right = torch.cat((torch.zeros(W.numel(), dtype=W.dtype), -W.flatten()[pinned]))
    D = torch.linalg.solve(system, right)[: W.numel()]
    return D.view_as(W), (D @ F @ D / 2).item()


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 4).double()
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh().square().sum(dim=-1)  # one loss a token


def observed(model: Toy, x: Tensor) -> tuple[Tensor, Tensor]:
    with observed_curvature({"linear": model.linear}, {"linear": "input"}, torch.float64) as curvature:
        model(x.clone().requires_grad_()).sum().backward()
    num_tokens = x[..., 0].numel()
    return curvature.A("input", num_tokens), curvature.G("linear", num_tokens)


def weight_gradient(model: Toy, x: Tensor) -> Tensor:
    W = model.linear.weight.clone().requires_grad_()
    loss = nn.functional.linear(x, W, model.linear.bias).tanh().square().sum()
    return torch.autograd.grad(loss, W)[0]


def test_factors_are_the_means_of_outer_products():
    model, x = Toy(), torch.randn(3, 7, 5, dtype=torch.float64)
    A, G = observed(model, x)
    tokens = x.reshape(-1, 5)
    torch.testing.assert_close(A, torch.stack([torch.outer(t, t) for t in tokens]).mean(dim=0))
    y = model.linear(tokens)
    g = 2 * y.tanh() * (1 - y.tanh() ** 2)
    torch.testing.assert_close(G, torch.stack([torch.outer(t, t) for t in g]).mean(dim=0))
    assert model.linear.weight.grad is None and not model.linear._forward_hooks


def test_one_token_gives_the_exact_fisher():
    model, x = Toy(), torch.randn(1, 1, 5, dtype=torch.float64)
    A, G = observed(model, x)
    gradient = weight_gradient(model, x).T.flatten()  # vec of W (in, out)
    torch.testing.assert_close(torch.kron(A, G), torch.outer(gradient, gradient))


def test_many_tokens_give_the_fisher_of_independent_factors():
    """Over a grid of inputs and gradients (independent) the mean outer product of weight gradients is Kronecker's."""
    x, g = torch.randn(6, 5, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    fisher = torch.stack([torch.outer(v := torch.outer(a, b).flatten(), v) for a in x for b in g]).mean(dim=0)
    torch.testing.assert_close(fisher, torch.kron(x.T @ x / 6, g.T @ g / 8))


@pytest.mark.parametrize("rows_each", [1, 2])
def test_cost_is_the_minimum_of_the_quadratic(rows_each: int):
    W, A, G = torch.randn(6, 4, dtype=torch.float64), positive_definite(6), positive_definite(4)
    costs = removal_costs(W, inverse(A), G, rows_each)
    for block, cost in enumerate(costs):
        rows = torch.arange(6) // rows_each == block
        assert cost.item() == pytest.approx(constrained_minimum(W, A, G, rows)[1], rel=1e-9)


def test_columns_are_rows_of_the_transpose():
    W, A, G = torch.randn(4, 6, dtype=torch.float64), positive_definite(4), positive_definite(6)
    removed = torch.tensor([True, False, False, True, False, False])
    D, cost = constrained_minimum(W.T.contiguous(), G, A, removed)
    torch.testing.assert_close(without_rows(W.T, inverse(G), removed).T, W + D.T)
    by_columns = torch.kron(A, G) @ (D.T.flatten())  # the same quadratic, written for W itself
    assert cost == pytest.approx((D.T.flatten() @ by_columns / 2).item(), rel=1e-9)


def test_update_is_the_constrained_minimiser_for_all_rows_jointly():
    W, A, G = torch.randn(6, 4, dtype=torch.float64), positive_definite(6), positive_definite(4)
    removed = torch.tensor([True, False, True, False, False, True])
    D, _ = constrained_minimum(W, A, G, removed)
    updated = without_rows(W, inverse(A), removed)
    torch.testing.assert_close(updated, W + D, rtol=1e-8, atol=1e-10)
    assert (updated[removed] == 0).all()


def test_removed_rows_leave_least_squares_on_the_inputs():
    """With the exact Gram matrix the update is the regression of the dense output on the inputs that stay."""
    X, W = (
        torch.randn(40, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64),
        torch.randn(6, 4, dtype=torch.float64),
    )
    removed = torch.tensor([True, False, False, True, False, False])
    updated = without_rows(W, inverse(X.T @ X), removed)
    torch.testing.assert_close(
        updated[~removed], torch.linalg.lstsq(X[:, ~removed], X @ W).solution, rtol=1e-7, atol=1e-8
    )


def test_curvature_of_a_model_is_that_of_its_tokens():
    model = dense_model("llama").double()
    task = task_of(model, 0.3, num_samples=4, sequence_length=10)
    curvature = LLMSurgeon(coupling="both", batch_size=3)._curvature(task, model)
    layer, ids = decoder_layers(model)[1], task.calibration.tokens.ids
    for role in ("query", "value", "output", "gate", "down"):
        seen = {}
        linear = getattr(task.family, role)(layer)

        def keep(_, args, out, seen=seen):
            seen.update(x=args[0].detach(), y=out)

        hook = linear.register_forward_hook(keep)
        loss = summed_loss(model, ids)
        hook.remove()
        x, g = seen["x"].flatten(0, 1), torch.autograd.grad(loss, seen["y"])[0].flatten(0, 1)
        names = {
            "query": "attention.C_x",
            "value": "attention.C_x",
            "output": "value_output.C_o",
            "gate": "mlp.C_x",
            "down": "mlp.C",
        }
        torch.testing.assert_close(curvature.A(f"1.{names[role]}", 40), x.T @ x / 40, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(curvature.G(f"1.{role}", 40), g.T @ g / 40, rtol=1e-4, atol=1e-9)


def test_one_shot_removes_the_cheapest_channels_and_updates_the_rest():
    model = dense_model("llama").double()
    task = task_of(model, 0.2)
    method = LLMSurgeon(shots=1)
    curvature = method._curvature(task_of(model, 0.2), model)
    compressed = method.compress(task)
    for index, (dense, small) in enumerate(zip(decoder_layers(model), decoder_layers(compressed.model), strict=True)):
        A, G = curvature.A(f"{index}.mlp.C", 160), curvature.G(f"{index}.down", 160)
        W = dense.mlp.down_proj.weight.T
        own = inverse(damped(A, method.damping))
        costs = removal_costs(W, own, damped(G, method.damping), 1)
        width = small.mlp.down_proj.in_features
        kept = torch.zeros(40, dtype=torch.bool)
        kept[costs.argsort()[40 - width :]] = True
        torch.testing.assert_close(small.mlp.down_proj.weight, without_rows(W, own, ~kept)[kept].T)
        assert torch.equal(small.mlp.up_proj.weight, dense.mlp.up_proj.weight[kept])
    assert len({layer["ranks"]["mlp"] for layer in compressed.layers}) > 1, "the threshold is global"


def test_the_cheapest_a_weight_go_of_heads_and_channels_alike():
    """Every structure of the model in one list, by its cost for each weight that it holds."""
    model, method = dense_model("llama").double(), LLMSurgeon(shots=1)
    curvature = method._curvature(task_of(model, 0.45), model)
    compressed, family = method.compress(task_of(model, 0.45)), task_of(model, 0.45).family
    sizes = {"num_kv_heads": 32 * (16 + 8 + 8 + 16), "mlp": 3 * 32}
    found = []
    for index, layer in enumerate(decoder_layers(model)):
        for name, role, gram, rows in (
            ("num_kv_heads", "output", "value_output.C_o", 16),
            ("mlp", "down", "mlp.C", 1),
        ):
            A, G = curvature.A(f"{index}.{gram}", 160), curvature.G(f"{index}.{role}", 160)
            W = getattr(family, role)(layer).weight.T
            costs = removal_costs(W, inverse(damped(A, 0.01)), damped(G, 0.01), rows)
            found += [(cost, sizes[name], index, name) for cost in costs.tolist()]

    def removed(key) -> list[tuple[int, str]]:
        gone, left = [], math.floor(0.45 * 20736 + 1e-6)
        for _, size, index, name in sorted(found, key=key):
            if size <= left:
                gone.append((index, name))
                left -= size
        return gone

    expected, unweighted = removed(lambda each: each[0] / each[1]), removed(lambda each: each[0])
    assert sorted(expected) != sorted(unweighted), "the division shows"
    dense = {"num_kv_heads": 2, "mlp": 40}
    for layer in compressed.layers:
        assert layer["ranks"] == {name: size - expected.count((layer["index"], name)) for name, size in dense.items()}


def test_each_shot_takes_its_share_on_the_curvature_of_what_the_last_one_left(monkeypatch: pytest.MonkeyPatch):
    """After shot k of K about k/K of the budget is gone, and what is gone weighs nothing in the next curvature."""
    taken, gone = [], []
    shoot = LLMSurgeon._shoot

    def watched(self, task, model, shape, curvature, kept, budget):
        for index, of_layer in enumerate(kept):
            channels = curvature.A(f"{index}.mlp.C", 160).diagonal()
            written = decoder_layers(model)[index].mlp.down_proj.weight.T
            assert (written[~of_layer.channels] == 0).all() and (channels > 0).all()
        gone.append(curvature.G("0.down", 160))
        kept = shoot(self, task, model, shape, curvature, kept, budget)
        sizes = StructureSizes.of(task.family, decoder_layers(task.model)[0], shape)
        taken.append(sum(sizes.removed(of_layer) for of_layer in kept))
        return kept

    monkeypatch.setattr(LLMSurgeon, "_shoot", watched)
    task = task_of(dense_model("llama"), 0.4)
    LLMSurgeon(shots=4).compress(task)
    budget, channel = 0.4 * 20736, 3 * 32
    assert all(budget * shot / 4 - channel <= weights <= budget * shot / 4 for shot, weights in enumerate(taken, 1))
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(gone))


@pytest.mark.parametrize("form", ["llama", "opt"])
def test_every_weight_of_a_structure_is_compensated_when_both_sides_count(form: str):
    model = dense_model(form)
    sides = {
        coupling: LLMSurgeon(shots=1, coupling=coupling).compress(task_of(model, 0.3)).model
        for coupling in ("inputs", "both")
    }
    family = task_of(model, 0.3).family
    for coupling, small in sides.items():
        changed = []
        for dense_layer, layer in zip(decoder_layers(model), decoder_layers(small), strict=True):
            rows = {tuple(row.tolist()) for row in family.up(dense_layer).weight}
            changed += [tuple(row.tolist()) not in rows for row in family.up(layer).weight]
        assert any(changed) == (coupling == "both")


def test_shots_meet_the_budget_and_count_their_passes():
    model = dense_model("llama")
    for shots in (1, 4):
        task = task_of(model, 0.4)
        compressed = LLMSurgeon(shots=shots).compress(task)
        assert achieved_sparsity(compressed, model) == pytest.approx(0.4, abs=0.01)
        meter = task.calibration.meter
        assert meter.forward_passes == pytest.approx(shots) and meter.backward_passes == pytest.approx(shots)
        assert meter.stages["curvature"].flops > 0 and meter.stages["solve"].flops > 0


@pytest.mark.parametrize(("option", "value"), [("shots", 0), ("damping", 0.0), ("batch_size", 0)])
def test_options_are_checked(option: str, value: float):
    with pytest.raises(UserError, match=f"method.{option}={value}"):
        LLMSurgeon(**{option: value})


@pytest.mark.parametrize("form", FORMS)
def test_protocol(form: str):
    method = LLMSurgeon(shots=2, coupling="both" if form in ("qwen3", "phi3") else "inputs")
    check_zero_sparsity(method, form)
    check_compression(method, form, 0.3, tolerance=0.01)


def test_the_calibration_text_decides():
    check_what_decides(LLMSurgeon(shots=2), "llama")


def test_nearly_everything_can_go():
    one_group = 1536 / 20736  # what may be left over when the small structures are gone
    compressed = check_compression(LLMSurgeon(shots=3), "llama", 0.95, tolerance=one_group)
    assert sum(layer["ranks"]["num_kv_heads"] + layer["ranks"]["mlp"] for layer in compressed.layers) > 0


def test_saved_and_generating(tmp_path):
    check_saved_and_generating(LLMSurgeon(shots=2), "llama", 0.4, tmp_path)
