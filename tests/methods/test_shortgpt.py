"""ShortGPT drops exactly the layers of lowest block influence."""

import copy

import pytest
import torch
from torch import nn

from modegpt.methods.layer_dropping import num_dropped_layers
from modegpt.methods.shortgpt import ShortGPT
from modegpt.models import block_linear_parameters, decoder_layers
from tests.methods.task_of import task_of
from tests.models.family_table import native_model, tokens


def brute_force_influence(model, ids: torch.Tensor) -> torch.Tensor:
    """1 - mean cosine of every token's stream before and after each layer, from one plain forward in float64."""
    model = copy.deepcopy(model).double()
    pairs: list[torch.Tensor] = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(
            lambda _, args, out: pairs.append(nn.functional.cosine_similarity(args[0], out, dim=-1))
        )
    with torch.no_grad():
        model(ids)
    return torch.stack([1 - cosines.mean() for cosines in pairs])


@pytest.mark.parametrize("form", ["llama", "mistral-window", "opt", "opt-post-norm-projected"])
@pytest.mark.parametrize(("sparsity", "count"), [(0.2, 1), (0.5, 2)])
def test_drops_the_layers_of_lowest_influence(form: str, sparsity: float, count: int):
    model = native_model(form, num_hidden_layers=4)
    with torch.no_grad():
        for layer, strength in zip(decoder_layers(model), (1.0, 0.1, 0.6, 0.3), strict=True):
            for parameter in layer.parameters():
                parameter.mul_(strength)
    task = task_of(model, sparsity)
    influence = brute_force_influence(model, task.calibration.tokens.ids)
    compressed = ShortGPT().compress(task)
    assert torch.tensor(compressed.influence) == pytest.approx(influence, abs=1e-5)
    expected = influence.argsort()[:count].tolist()
    assert compressed.details["dropped_layers"] == expected
    assert [layer["sparsity"] for layer in compressed.layers] == [float(index in expected) for index in range(4)]
    assert (
        compressed.details["removed_share"]
        == count / 4
        == 1 - block_linear_parameters(compressed.model) / block_linear_parameters(model)
    )

    shorter = copy.deepcopy(model)
    shorter.get_decoder().layers = nn.ModuleList(
        layer for index, layer in enumerate(decoder_layers(shorter)) if index not in expected
    )
    shorter.config.num_hidden_layers = 4 - count
    with torch.no_grad():
        torch.testing.assert_close(
            compressed.model(tokens()).logits, shorter(tokens(), use_cache=False).logits, rtol=0, atol=1e-5
        )
    assert (
        task.calibration.meter.forward_passes == pytest.approx(1) and task.calibration.meter.calibration_tokens == 160
    )


@pytest.mark.parametrize("form", ["llama", "opt"])
def test_nothing_to_remove_leaves_logits_identical(form: str):
    model = native_model(form)
    compressed = ShortGPT().compress(task_of(model, 0.0))
    with torch.no_grad():
        assert torch.equal(compressed.model(tokens()).logits, model(tokens()).logits)
    assert compressed.details["dropped_layers"] == []


def test_count_is_nearest_and_leaves_a_layer():
    for num_layers in range(1, 13):
        for percent in range(100):
            count = num_dropped_layers(percent / 100, num_layers)
            assert 0 <= count < num_layers
            distance = abs(count * 100 - percent * num_layers)
            assert all(distance <= abs(other * 100 - percent * num_layers) for other in range(num_layers))
    assert num_dropped_layers(0.1, 5) == 1, "half a layer counts as one"
    assert num_dropped_layers(0.3, 5) == 2


def test_generates_with_the_cache():
    compressed = ShortGPT().compress(task_of(native_model("llama"), 0.4)).model
    cached, uncached = (
        compressed.generate(tokens(), max_new_tokens=6, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)
