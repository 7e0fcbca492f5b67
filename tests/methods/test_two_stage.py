"""2SSP: channels of small norm, then attentions that the model predicts best without, both by brute force."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from modegpt.errors import UserError
from modegpt.methods.two_stage import TwoStage, num_attentions
from modegpt.models import decoder_layers, family_of
from tests.methods.protocol_checks import FORMS, check_compression, check_saved_and_generating, check_zero_sparsity
from tests.methods.task_of import task_of
from tests.models.family_table import native_model


@pytest.mark.parametrize("form", FORMS)
def test_it_is_a_method_like_any_other(form: str) -> None:
    check_zero_sparsity(TwoStage(), form)
    check_compression(TwoStage(), form, 0.4, tolerance=0.02)


def test_its_models_save_and_generate(tmp_path: Path) -> None:
    check_saved_and_generating(TwoStage(), "llama", 0.5, tmp_path)


def loss_of(model: PreTrainedModel, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return sum(model(window[None], labels=window[None], use_cache=False).loss.item() for window in ids) / len(ids)


def without_attention(model: PreTrainedModel, index: int) -> PreTrainedModel:
    changed = copy.deepcopy(model)
    for parameter in family_of(model.config).output(decoder_layers(changed)[index]).parameters():
        nn.init.zeros_(parameter)
    return changed


@pytest.mark.parametrize("form", ["llama", "opt", "opt-post-norm-projected", "gemma3_text", "olmo2"])
def test_both_stages_equal_brute_force(form: str) -> None:
    model = native_model(form)
    family, method = family_of(model.config), TwoStage(alpha=3.0, search_tokens=20)
    task = task_of(model, 0.5, num_samples=6, sequence_length=12)
    ids, (count, channels) = task.calibration.tokens.ids, method.balance(task)
    assert count >= 2 and channels >= 1
    downs = [family.down(layer) for layer in decoder_layers(model)]
    norms: list[list[torch.Tensor]] = [[] for _ in downs]
    handles = [
        down.register_forward_pre_hook(lambda _, args, of=of: of.append(args[0].reshape(12, -1).norm(dim=0)))
        for down, of in zip(downs, norms, strict=True)
    ]
    with torch.no_grad():
        for window in ids:
            model(window[None])
    for handle in handles:
        handle.remove()
    compressed = method.compress(task)
    expected = copy.deepcopy(model)
    for layer, of_layer in zip(decoder_layers(expected), norms, strict=True):
        # of dead channels, which may wake up behind a removed attention, the later go
        gone = torch.stack(of_layer).mean(dim=0).argsort(descending=True, stable=True)[-channels:]
        with torch.no_grad():
            family.down(layer).weight[:, gone] = 0
    removed, perplexities = [], []
    for _ in range(count):
        losses = {
            index: loss_of(without_attention(expected, index), ids[:2])
            for index in range(len(downs))
            if index not in removed
        }
        removed.append(min(losses, key=losses.__getitem__))
        expected = without_attention(expected, removed[-1])
        perplexities.append(math.exp(losses[removed[-1]]))
    assert compressed.details["removed_attentions"] == removed
    assert compressed.details["calibration_perplexities"] == pytest.approx(perplexities, rel=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compressed.model(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
    heads = [layer["ranks"]["num_kv_heads"] for layer in compressed.layers]
    assert [index for index, left in enumerate(heads) if not left] == sorted(removed)
    layers_run, num_layers = 0, len(downs)  # a candidate's layer and those above it, and those below the last candidate
    for step in range(count):
        tried = sorted(set(range(num_layers)) - set(removed[:step]))
        layers_run += sum(num_layers - index for index in tried) + tried[-1]
    assert task.calibration.meter.forward_passes == pytest.approx(1 + layers_run / num_layers * 2 / 6)


def test_the_stages_are_balanced_by_what_attention_and_mlp_weigh() -> None:
    """Equation 5 at Llama-2-7B's sizes, and its limits."""
    sizes = {"attention": 4 * 4096**2, "mlp": 3 * 4096 * 11008}
    assert [num_attentions(rate, 32, **sizes, alpha=1.5) for rate in (0.0, 0.25, 0.375, 0.5)] == [0, 5, 9, 13]
    assert num_attentions(0.5, 32, **sizes, alpha=3.0) > 13 > num_attentions(0.5, 32, **sizes, alpha=1.0)


def test_a_balance_that_cannot_be_is_refused_before_the_start() -> None:
    with pytest.raises(UserError, match=r"raise method\.alpha"):
        TwoStage(alpha=0.05).check(task_of(native_model("llama"), 0.9))


def test_no_more_attentions_go_than_the_sparsity_allows() -> None:
    task = task_of(native_model("llama", num_hidden_layers=5), 0.2)
    count, channels = TwoStage(alpha=50.0).balance(task)
    assert 0 < count < num_attentions(0.2, 5, attention=1, mlp=3, alpha=50.0) and channels >= 0


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"search_tokens": 0}])
def test_wrong_options_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match="must be above 0"):
        TwoStage(**wrong)


def test_mixtures_are_refused() -> None:
    assert "does not know mixtures" in str(TwoStage().applicable(family_of(native_model("mixtral").config)))
