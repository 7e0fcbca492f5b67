"""SliceGPT: what its paper proves (rotation changes nothing) and defines (what slicing keeps)."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from modegpt.calibration.stream import HiddenStates
from modegpt.errors import UserError
from modegpt.methods.slicegpt import (
    SliceGPT,
    Stream,
    centred,
    lost_energy,
    principal_axes,
    projected,
    sliced_parameters,
)
from modegpt.models import FAMILIES, block_linear_parameters, decoder_layers
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model, native_model, tokens

FORMS = {
    "llama": {},
    "llama-multihead-biased": {},
    "llama3-rope-tied": {},
    "llama-wide-heads": {},
    "mistral-window": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "opt": {},
    "mixtral": {},
    "qwen3_moe": {},
    "olmoe": {},
}
OPT_FORMS = {
    "opt-without-biases": {"enable_bias": False},
    "opt-without-affine-norms": {"layer_norm_elementwise_affine": False},
}
ROTATE_ONLY = SliceGPT(budget="slicing", slice_head=True)
"""With a sparsity that rounds to no direction at all: everything is rotated, nothing sliced."""


def model_of(form: str) -> PreTrainedModel:
    return native_model("opt", **OPT_FORMS[form]) if form in OPT_FORMS else dense_model(form, **FORMS[form])


def inputs_of_layers(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """The stream entering each layer, (num_tokens, width)."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        for layer in decoder_layers(model)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("form", [*FORMS, *OPT_FORMS])
@pytest.mark.parametrize("calibrate_on", ["sliced", "dense"])
def test_rotation_alone_leaves_logits_unchanged(form: str, calibrate_on: str):
    model = model_of(form).double()
    rotated = dataclasses.replace(ROTATE_ONLY, calibrate_on=calibrate_on).compress(task_of(model, 1e-3))
    assert rotated.details["kept_size"] == model.config.hidden_size
    ids = tokens()
    with torch.no_grad():
        dense, ours = model(ids).logits, rotated.model(ids).logits
    # The families' own RMSNorm rounds to float32 whatever the model's dtype; LayerNorm does not.
    tolerance = 1e-10 if form.startswith("opt") else 1e-5
    torch.testing.assert_close(ours, dense, rtol=0, atol=tolerance * dense.abs().max().item())
    embedded = rotated.model.get_input_embeddings().weight
    assert not torch.allclose(embedded, model.get_input_embeddings().weight, atol=0.1)


@pytest.mark.parametrize("form", ["llama3-rope-tied", "opt"])
def test_rotation_alone_is_exact_to_single_precision(form: str):
    model = model_of(form)
    rotated = ROTATE_ONLY.compress(task_of(model, 1e-3)).model
    assert rotated.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(rotated(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["llama", "opt"])
def test_dense_order_slices_the_rotated_model(form: str):
    """Rotating everything on the dense stream and cutting the last directions off is the whole method."""
    model = model_of(form).double()
    method = dataclasses.replace(ROTATE_ONLY, calibrate_on="dense")
    rotated = method.compress(task_of(model, 1e-3)).model.state_dict()
    sliced = method.compress(task_of(model, 0.25)).model.state_dict()
    assert sliced["lm_head.weight"].shape[1] == 24
    for name, tensor in sliced.items():
        torch.testing.assert_close(
            tensor, rotated[name][tuple(slice(size) for size in tensor.shape)], rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("form", ["llama", "llama-multihead-biased", "opt", "mixtral"])
def test_sliced_network_runs_on_its_own_principal_axes(form: str):
    """On the calibration tokens, the sliced network's stream has a diagonal, decreasing Gram matrix at every layer."""
    model = model_of(form).double()
    task = task_of(model, 0.3)
    compressed = SliceGPT().compress(task)
    for index, x in enumerate(inputs_of_layers(compressed.model, task.calibration.tokens.ids)):
        C = x.T @ x
        energies = C.diagonal()
        assert (energies.diff() <= 1e-9 * energies[0]).all()
        torch.testing.assert_close(
            C,
            torch.diag(energies),
            rtol=0,
            atol=1e-4 * energies[-1].item() + 1e-9 * energies[0].item(),
            msg=f"layer {index}",
        )


@pytest.mark.parametrize("form", ["llama", "opt"])
def test_slicing_keeps_exactly_the_top_energy(form: str):
    model = model_of(form).double()
    task = task_of(model, 0.4)
    compressed = SliceGPT(budget="slicing").compress(task)
    size = compressed.details["kept_size"]
    assert size == 19
    x = torch.cat([batch.flatten(0, 1) for batch in task.calibration.embed().batches])
    if form == "opt":
        x = x - x.mean(dim=1, keepdim=True)
    singular = torch.linalg.svdvals(x).square()
    kept = inputs_of_layers(compressed.model, task.calibration.tokens.ids)[0].square().sum()
    torch.testing.assert_close(kept, singular[:size].sum(), rtol=1e-9, atol=0)
    lost = compressed.layers[0]["relative_error"]["attention_input"]
    assert lost == pytest.approx((singular[size:].sum() / singular.sum()).item(), rel=1e-9)
    assert lost > 1e-3


@pytest.mark.parametrize("slice_head", [False, True])
@pytest.mark.parametrize("form", ["llama", "opt", "mixtral"])
def test_parameter_budget_is_met_to_the_nearest_width(form: str, slice_head: bool):
    model = model_of(form)
    dense, full_size = block_linear_parameters(model), model.config.hidden_size
    method = SliceGPT(slice_head=slice_head)
    for sparsity in (0.1, 0.3, 0.5):
        compressed = method.compress(task_of(model, sparsity))
        size, details = compressed.details["kept_size"], compressed.details
        named = decoder_layers(compressed.model).named_parameters()
        stored = sum(each.numel() for name, each in named if each.ndim == 2 and ".mlp.gate.weight" not in name)
        assert block_linear_parameters(compressed.model) == stored
        assert details["removed_share"] == pytest.approx(1 - stored / dense, abs=1e-12)
        layers: Any = decoder_layers(compressed.model)
        shortcuts = sum(layer.attention_shortcut.weight.numel() + layer.mlp_shortcut.weight.numel() for layer in layers)
        assert details["shortcut_parameters"] == shortcuts > 0
        assert (
            details["slicing_fraction"] == pytest.approx(1 - size / full_size)
            and details["slicing_fraction"] > details["removed_share"]
        )
        for other in (size - 1, size + 1):
            share = 1 - sliced_parameters(model, method.stream_sizes(other, 3, full_size)) / dense
            assert abs(details["removed_share"] - sparsity) <= abs(share - sparsity)


def test_width_is_a_multiple_when_asked():
    model = model_of("llama")
    assert SliceGPT(budget="slicing", multiple=8).compress(task_of(model, 0.3)).details["kept_size"] == 24
    with pytest.raises(UserError, match="larger than the model's hidden size 32"):
        SliceGPT(multiple=33).compress(task_of(model, 0.3))


@pytest.mark.parametrize("form", ["llama", "opt"])
def test_orders_differ_and_the_sequential_one_follows_the_damage(form: str):
    model = model_of(form)
    sequential, dense = (
        SliceGPT(calibrate_on=order).compress(task_of(model, 0.4)).model for order in ("sliced", "dense")
    )
    layers = [decoder_layers(other)[2].attention_shortcut.weight for other in (sequential, dense)]
    assert layers[0].shape == layers[1].shape and not torch.allclose(layers[0].abs(), layers[1].abs(), atol=1e-3)


def test_normalised_signal_weighs_every_token_alike():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 50, 8, generator=generator, dtype=torch.float64)
    lengths = torch.rand(1, 50, 1, generator=generator, dtype=torch.float64) * 10 + 0.1

    def kept(batch: Tensor, normalised: bool) -> Tensor:
        Q, _ = Stream(HiddenStates([batch], []), torch.float64, normalised=normalised, follow=False).slice(4)
        return Q @ Q.T

    torch.testing.assert_close(kept(x, True), kept(x * lengths, True))
    assert not torch.allclose(kept(x, False), kept(x * lengths, False), atol=1e-2)


@pytest.mark.parametrize("form", ["llama3-rope-tied", "opt"])
def test_nothing_to_remove_returns_the_dense_model(form: str):
    model = model_of(form)
    compressed = SliceGPT().compress(task_of(model, 0.0))
    with torch.no_grad():
        assert torch.equal(compressed.model(tokens()).logits, model(tokens()).logits)
    assert compressed.details["removed_share"] == 0 and len(compressed.layers) == 3


@pytest.mark.parametrize("form", ["llama3-rope-tied", "opt"])
def test_dense_model_is_untouched_and_cost_is_metered(form: str):
    model = model_of(form)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task = task_of(model, 0.3)
    compressed = SliceGPT().compress(task)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not {p.data_ptr() for p in compressed.model.parameters()} & {p.data_ptr() for p in model.parameters()}
    cost = task.calibration.meter.summary()
    assert cost["forward_passes"] == 1 and cost["backward_passes"] == 0 and cost["calibration_tokens"] == 160
    assert [stage["name"] for stage in cost["stages"]] == ["slicing"] and cost["stages"][0]["flops"] > 1e6


def test_bfloat16_stays_bfloat16():
    model = model_of("llama").to(torch.bfloat16)
    sliced = SliceGPT().compress(task_of(model, 0.3)).model
    assert {parameter.dtype for parameter in sliced.parameters()} == {torch.bfloat16}
    assert sliced.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.isfinite(sliced(tokens()).logits).all()


def test_refuses_what_it_cannot_slice():
    with pytest.raises(UserError, match="do_layer_norm_before=false"):
        SliceGPT().compress(task_of(native_model("opt-post-norm-projected"), 0.3))
    assert "gemma" in SliceGPT().applicable(FAMILIES["gemma"])
    assert all(SliceGPT().applicable(FAMILIES[name]) is None for name in (*FORMS.keys() & FAMILIES.keys(), "mistral"))
    for wrong in ({"budget": "weights"}, {"calibrate_on": "both"}, {"signal": "x"}, {"multiple": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            SliceGPT(**wrong)


def test_principal_axes_of_a_singular_gram_matrix():
    x = torch.randn(5, 8, dtype=torch.float64)
    C = x.T @ x
    energies, Q = principal_axes(C)
    assert (energies >= 0).all() and (energies.diff() <= 0).all()
    torch.testing.assert_close(Q.T @ Q, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(Q @ torch.diag(energies) @ Q.T, C)
    assert lost_energy(energies, 5) < 1e-12 < lost_energy(energies, 4)
    for size in (1, 3, 8):
        left = (x - projected(x, Q[:, :size])).square().sum() / x.square().sum()
        assert lost_energy(energies, size) == pytest.approx(left.item(), abs=1e-12)
    assert centred(x).sum(dim=-1).abs().max() < 1e-12
