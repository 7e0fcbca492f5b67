"""The improved method on every family: exact at zero, on budget, its refits those of explicit activations."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from modegpt.allocation.policies import Uniform
from modegpt.architectures import block_linear_parameters, decoder_layers, layer_shapes
from modegpt.compression.modegpt import MoDeGPT
from modegpt.compression.plus.method import MoDeGPTPlus
from modegpt.compression.plus.sensitivity import expected
from modegpt.compression.plus.streams import Split
from modegpt.decompositions import MLPNystrom, QueryKeyCR, ValueOutputSVD
from modegpt.decompositions.regression import Moments, Refit, ridge_towards
from modegpt.errors import UserError
from tests.architectures.family_table import CONFIGS, dense_model
from tests.baselines.protocol_checks import achieved_sparsity, check_compression, check_saved_and_generating, check_zero_sparsity
from tests.baselines.task_of import task_of

OFF = {"sequential": False, "refit": False, "beta": 0.0, "mlp": "leverage", "query_key": "paper", "value_output": "values", "bias": "none", "allocation": "uniform"}


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3"])
def test_zero_sparsity_is_the_dense_model_to_the_bit(name: str) -> None:
    check_zero_sparsity(MoDeGPTPlus(), name)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_budget_is_met_within_half_a_step(name: str) -> None:
    model = dense_model(name)
    width, gated = model.config.hidden_size, name not in ("opt", "opt-post-norm-projected")
    half_step = width * (3 if gated else 2) / 2 / block_linear_parameters(model)
    check_compression(MoDeGPTPlus(), name, 0.3, tolerance=half_step * 1.0001)


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_compressed_models_save_and_generate(name: str, tmp_path: Path) -> None:
    check_saved_and_generating(MoDeGPTPlus(bias="added"), name, 0.3, tmp_path / "model")


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("switch", [{"allocation": "entropic"}, {"query_key": "checked", "allocation": "uniform"}, {"bias": "none"}, {"bias": "added"}])
def test_every_switch_runs(name: str, switch: dict) -> None:
    check_compression(MoDeGPTPlus(**switch), name, 0.3, tolerance=0.02)


def test_all_off_is_the_paper_but_for_the_ridge() -> None:
    ours = MoDeGPTPlus(**OFF).compress(task_of(dense_model("llama"), 0.3, num_samples=24))
    paper = MoDeGPT(mlp=MLPNystrom(), query_key=QueryKeyCR(), value_output=ValueOutputSVD(), allocation=Uniform()).compress(task_of(dense_model("llama"), 0.3, num_samples=24))
    for one, other in zip(decoder_layers(ours.model), decoder_layers(paper.model), strict=True):
        assert torch.equal(one.mlp.up_proj.weight, other.mlp.up_proj.weight)
        torch.testing.assert_close(one.self_attn.q_proj.weight, other.self_attn.q_proj.weight)
        product, expected = (layer.self_attn.o_proj.weight[:, : layer.self_attn.v_dim] @ layer.self_attn.v_proj.weight[: layer.self_attn.v_dim] for layer in (one, other))
        torch.testing.assert_close(product, expected, rtol=1e-3, atol=1e-5)


def unridged(fit: Moments, held: Moments, start: tuple[Tensor, Tensor]) -> Refit:
    return Refit(ridge_towards(fit + held, start[1], 0.0)[0], 0.0, (0.0, 0.0), {})


@pytest.mark.parametrize("name", ["llama", "llama-multihead-biased", "opt", "opt-post-norm-projected"])
def test_refits_are_least_squares_on_explicit_activations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ridge, the last layer's two output maps solve for the dense stream plus beta times the error so far."""
    monkeypatch.setattr("modegpt.compression.plus.layer.held_out_refit", unridged)
    beta = 0.5
    model, task = dense_model(name), task_of(dense_model(name), 0.3, num_samples=30)
    compressed = MoDeGPTPlus(beta=beta, allocation="uniform", bias="none").compress(task).model
    family, ids = task.family, task.calibration.tokens.ids
    last = [decoder_layers(m)[-1] for m in (model, compressed)]
    seen: list[dict] = [{}, {}]
    for layer, store in zip(last, seen, strict=True):
        layer.register_forward_pre_hook(lambda _, args, store=store: store.update(x=args[0]))
        family.output(layer).register_forward_hook(lambda _, args, out, store=store: store.update(z=args[0], attention=out))
        family.up(layer).register_forward_pre_hook(lambda _, args, store=store: store.update(u=args[0].reshape(store["x"].shape)))
        family.down(layer).register_forward_hook(lambda _, args, out, store=store: store.update(h=args[0], mlp=out))
    with torch.no_grad():
        model(ids), compressed(ids)
    dense, ours = ({key: value.reshape(-1, value.shape[-1]).double() for key, value in store.items()} for store in seen)
    for store in (dense, ours):
        store["middle"] = store["u"] if "post-norm" in name else store["x"] + store["attention"]

    def check(features: str, output: str, before: str, linear: torch.nn.Linear) -> None:
        target = dense[output] + beta * (dense[before] - ours[before])
        if linear.bias is not None:
            target = target - linear.bias.double()
        W = torch.linalg.lstsq(ours[features], target).solution
        best, got = ((ours[features] @ M - target).square().sum() for M in (W, linear.weight.detach().double().T))
        assert got <= best * (1 + 1e-5)

    check("z", "attention", "x", family.output(last[1]))
    check("h", "mlp", "middle", family.down(last[1]))


def test_selection_is_never_worse_than_the_papers_on_held_out_windows() -> None:
    for name in ("llama", "opt", "qwen2-windows"):
        compressed = MoDeGPTPlus(allocation="uniform").compress(task_of(dense_model(name), 0.4))
        for layer in compressed.layers:
            errors = layer["numerics"]["query_key"]["held_out"]
            assert layer["relative_error"]["query_key"] <= min(errors.values()) * (1 + 1e-9)
            assert {"paper", "logits", "output"} < set(errors)


def test_head_norms_keep_queries_and_keys_and_the_rest_pays() -> None:
    compressed = MoDeGPTPlus().compress(task_of(dense_model("qwen3"), 0.3))
    assert {layer["ranks"]["query_key"] for layer in compressed.layers} == {16}
    assert achieved_sparsity(compressed, dense_model("qwen3")) == pytest.approx(0.3, abs=0.02)


def test_skipped_layers_stay_dense_and_module_sparsities_are_followed() -> None:
    model = dense_model("llama")
    compressed = MoDeGPTPlus(skip_layers=(1,)).compress(task_of(model, 0.3))
    assert layer_shapes(compressed.model.config)[1] == layer_shapes(model.config)[1]
    assert achieved_sparsity(compressed, model) == pytest.approx(0.3, abs=0.02)
    own = MoDeGPTPlus(module_sparsity={"query_key": 0.5}, rank_multiple={"mlp": 4}).compress(task_of(model, 0.3))
    assert all(layer["ranks"]["query_key"] == 4 and layer["ranks"]["mlp"] % 4 == 0 for layer in own.layers)


@pytest.mark.parametrize("changes", [{"beta": 2.0}, {"mlp": "best"}, {"cap": 1.0}, {"shares": ()}, {"sequential": False}, {"query_key_windows": 0}])
def test_wrong_options_are_refused(changes: dict) -> None:
    with pytest.raises(UserError, match=f"method.{next(iter(changes))}|method.refit"):
        MoDeGPTPlus(**changes)


def test_divergence_follows_the_closed_form_through_what_was_measured() -> None:
    curve = [0.0, 1.0, 2.0, 4.0, 8.0]
    assert expected(curve, {2: 0.1}) == pytest.approx([0.0, 0.05, 0.1, 0.2, 0.4])
    assert expected(curve, {2: 0.1, 3: 0.4}) == pytest.approx([0.0, 0.05, 0.1, 0.4, 1.6])
    assert expected(curve, {1: 0.5, 3: 0.1})[3:] == pytest.approx([0.5, 0.5])
    assert expected([0.0] * 3, {1: 0.3}) == [0.0] * 3


def test_modules_at_full_rank_correct_what_came_before() -> None:
    """With queries and keys reduced alone, later output matrices still move; in front of the first change nothing does."""
    own = {"mlp": 0.0, "value_output": 0.0, "query_key": 0.5}
    model = dense_model("llama")
    compressed = MoDeGPTPlus(module_sparsity=own, allocation="uniform").compress(task_of(model, 0.1, num_samples=30)).model
    dense = MoDeGPTPlus(module_sparsity=own, allocation="uniform", refit=False).compress(task_of(model, 0.1, num_samples=30)).model
    for m, moved in ((compressed, True), (dense, False)):
        layer, reference = decoder_layers(m)[1], decoder_layers(model)[1]
        assert torch.equal(layer.mlp.up_proj.weight, reference.mlp.up_proj.weight)
        assert torch.equal(layer.mlp.down_proj.weight, reference.mlp.down_proj.weight) != moved


def test_held_out_windows_are_whole_and_a_quarter() -> None:
    held = torch.cat(Split.of(torch.zeros(32, 5), batch_size=3).held)
    assert held.all(dim=1).sum() == 8 and held.any(dim=1).sum() == 8
    assert torch.cat(Split.of(torch.zeros(2, 5), batch_size=3).held).all(dim=1).tolist() == [False, True]
    assert Split.of(torch.zeros(1, 8), batch_size=3).held[0].sum() == 2


def test_one_window_is_enough_to_run() -> None:
    check = MoDeGPTPlus().compress(task_of(dense_model("llama"), 0.3, num_samples=1))
    assert achieved_sparsity(check, dense_model("llama")) == pytest.approx(0.3, abs=0.02)
