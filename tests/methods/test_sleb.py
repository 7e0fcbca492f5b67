"""SLEB: each step removes the layer whose absence hurts calibration perplexity least."""

import copy
import math

import pytest
import torch
from torch import nn

from modegpt.errors import UserError
from modegpt.methods.sleb import SLEB, losses_without, num_candidates
from modegpt.models import decoder_layers
from tests.methods.task_of import task_of
from tests.models.family_table import native_model, tokens


def brute_force_loss(model, ids: torch.Tensor, alive: list[int]) -> float:
    """The mean next-token loss of a copy of ``model`` that has only the layers ``alive``, each window by itself."""
    shorter = copy.deepcopy(model)
    shorter.get_decoder().layers = nn.ModuleList(decoder_layers(shorter)[index] for index in alive)
    shorter.config.num_hidden_layers = len(alive)
    with torch.no_grad():
        losses = [shorter(window[None], labels=window[None], use_cache=False).loss.item() for window in ids]
    return sum(losses) / len(losses)


def distinct_layers(form: str, num_layers: int = 5):
    model = native_model(form, num_hidden_layers=num_layers)
    with torch.no_grad():
        for index, layer in enumerate(decoder_layers(model)):
            for parameter in layer.parameters():
                parameter.mul_(0.3 + 0.7 * ((index * 2) % num_layers) / num_layers)
    return model


@pytest.mark.parametrize("form", ["llama", "mistral-window", "opt", "opt-post-norm-projected"])
def test_every_step_equals_brute_force(form: str):
    model = distinct_layers(form)
    task = task_of(model, 0.6, num_samples=5, sequence_length=12)
    ids = task.calibration.tokens.ids
    compressed = SLEB().compress(task)
    alive, dropped, perplexities = list(range(5)), [], []
    for _ in range(3):
        losses = {index: brute_force_loss(model, ids, [other for other in alive if other != index]) for index in alive}
        measured, _ = losses_without(model, ids, task.calibration.embed(), alive, alive, on_candidate=lambda: None)
        assert measured == pytest.approx(losses, rel=1e-5)
        dropped.append(min(losses, key=losses.get))
        alive.remove(dropped[-1])
        perplexities.append(math.exp(losses[dropped[-1]]))
    assert compressed.details["dropped_layers"] == dropped
    assert compressed.details["calibration_perplexities"] == pytest.approx(perplexities, rel=1e-5)
    with torch.no_grad():
        logits = compressed.model(ids).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.exp().item() == pytest.approx(perplexities[-1], rel=1e-5)


def test_ends_are_kept_when_asked():
    model = distinct_layers("llama")
    task = task_of(model, 0.2)
    losses, _ = losses_without(
        model,
        task.calibration.tokens.ids,
        task.calibration.embed(),
        list(range(5)),
        list(range(5)),
        on_candidate=lambda: None,
    )
    best = min(losses, key=losses.get)
    assert SLEB().compress(task).details["dropped_layers"] == [best]
    inside = [index for index in range(5) if index > best] or [index for index in range(5) if index < best]
    method = SLEB(num_first_kept=inside[0], num_last_kept=4 - inside[-1])
    assert method.compress(task).details["dropped_layers"] == [min(inside, key=losses.get)] != [best]
    dropped = SLEB(num_first_kept=1, num_last_kept=1).compress(task_of(model, 0.6)).details["dropped_layers"]
    assert sorted(dropped) == [1, 2, 3]
    with pytest.raises(UserError, match="cannot drop 4 of 5 layers"):
        SLEB(num_first_kept=1, num_last_kept=1).compress(task_of(model, 0.8))
    with pytest.raises(UserError, match="must not be negative"):
        SLEB(num_first_kept=-1)


def test_forward_passes_are_counted():
    model = distinct_layers("llama")
    task = task_of(model, 0.4)
    runs = []
    for layer in decoder_layers(model):
        layer.self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    SLEB().compress(task)
    batches = 3
    assert task.calibration.meter.forward_passes == pytest.approx(len(runs) / batches / 5)
    full_passes = num_candidates(SLEB(), 5, 2)
    assert full_passes == 5 + 4 and task.calibration.meter.forward_passes < full_passes
    assert task.calibration.meter.calibration_tokens == 160


@pytest.mark.parametrize("form", ["llama", "opt"])
def test_nothing_to_remove_leaves_logits_identical_and_costs_nothing(form: str):
    model = native_model(form)
    task = task_of(model, 0.0)
    compressed = SLEB().compress(task)
    with torch.no_grad():
        assert torch.equal(compressed.model(tokens()).logits, model(tokens()).logits)
    assert task.calibration.meter.forward_passes == 0 and compressed.details["dropped_layers"] == []
