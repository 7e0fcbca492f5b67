"""What every compression method owes the main job, checked on a family's tiny model."""

import copy
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from modegpt.methods.base import Compressed, Method
from modegpt.models import block_linear_parameters
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model, tokens

FORMS = ("llama", "llama-multihead-biased", "qwen3", "opt", "phi3")


def achieved_sparsity(compressed: Compressed, model) -> float:
    return 1 - block_linear_parameters(compressed.model) / block_linear_parameters(model)


def check_zero_sparsity(method: Method, form: str) -> None:
    """Nothing to remove: the dense model's logits to the bit."""
    model = dense_model(form)
    compressed = method.compress(task_of(model, 0.0))
    assert block_linear_parameters(compressed.model) == block_linear_parameters(model)
    with torch.no_grad():
        assert torch.equal(compressed.model(tokens()).logits, model(tokens()).logits)


def check_compression(method: Method, form: str, sparsity: float, *, tolerance: float) -> Compressed:
    """The budget is met to ``tolerance`` (share of the weights), the dense model is as before, the report complete."""
    model = dense_model(form)
    before = copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert method.applicable(task_of(model, sparsity).family) is None
    compressed = method.compress(task_of(model, sparsity))
    assert abs(achieved_sparsity(compressed, model) - sparsity) <= tolerance
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [layer["index"] for layer in compressed.layers] == list(range(model.config.num_hidden_layers))
    json.dumps([compressed.layers, compressed.details])
    with torch.no_grad():
        ours, dense = compressed.model(tokens()).logits, model(tokens()).logits
    assert torch.isfinite(ours).all() and not torch.equal(ours, dense)
    return compressed


def check_saved_and_generating(method: Method, form: str, sparsity: float, directory: Path) -> None:
    """The compressed model survives a round trip to disk, and generates the same with its cache as without."""
    compressed = method.compress(task_of(dense_model(form), sparsity)).model
    compressed.save_pretrained(directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, compressed(tokens()).logits)
    check_generating(compressed)


def check_generating(model) -> None:
    """Greedy generation with the cache gives what it gives without."""
    cached, uncached = (
        model.generate(tokens(), max_new_tokens=6, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)
