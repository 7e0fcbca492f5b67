"""What every compression method owes the main job, checked on a family's tiny model.

A method that met its budget with the wrong dims would look well by its budget alone: so what a report says is worked
out again from the weights themselves, and what should decide a result is shown to decide it.
"""

import copy
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, PreTrainedModel

from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.methods.modegpt import MoDeGPT
from modegpt.models import Family, block_linear_parameters, decoder_layers, layer_shapes, read_query_key
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model, tokens

FORMS = ("llama", "llama-multihead-biased", "qwen3", "opt", "phi3")
SIZES = {
    "mlp": "intermediate_size",
    "query_key": "qk_head_dim",
    "value_output": "v_head_dim",
    "num_kv_heads": "num_kv_heads",
}
"""What a rank of each name is of a layer's shape."""
WITHOUT_PRODUCTS = {"flap": {"score"}}
"""Stages of a method that multiply no matrices: FLAP standardises sums of squares."""
READERS = ("query", "key", "value", "gate", "up")
Errors = Callable[[Method, CompressionTask, Compressed], list[dict[str, float]]]


def achieved_sparsity(compressed: Compressed, model) -> float:
    return 1 - block_linear_parameters(compressed.model) / block_linear_parameters(model)


def check_zero_sparsity(method: Method, form: str) -> None:
    """Nothing to remove: the dense model's logits to the bit."""
    model = dense_model(form)
    compressed = method.compress(task_of(model, 0.0))
    assert block_linear_parameters(compressed.model) == block_linear_parameters(model)
    with torch.no_grad():
        assert torch.equal(compressed.model(tokens()).logits, model(tokens()).logits)


def check_compression(
    method: Method, form: str, sparsity: float, *, tolerance: float, errors: Errors | None = None
) -> Compressed:
    """The budget is met to ``tolerance`` (share of the weights), the dense model is as before, and the report is
    complete and true: the model has the ranks that it names, and the weights give the errors, by ``errors``.
    """
    model = dense_model(form)
    before = copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert method.applicable(task_of(model, sparsity).family) is None
    task = task_of(model, sparsity)
    compressed = method.compress(task)
    assert abs(achieved_sparsity(compressed, model) - sparsity) <= tolerance
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [layer["index"] for layer in compressed.layers] == list(range(model.config.num_hidden_layers))
    json.dumps([compressed.layers, compressed.details])
    meter = task.calibration.meter
    uncounted = {name for name, stage in meter.stages.items() if not stage.flops}
    assert uncounted <= WITHOUT_PRODUCTS.get(method.name, set()), "the work of every stage is counted"
    with torch.no_grad():
        ours, dense = compressed.model(tokens()).logits, model(tokens()).logits
    assert torch.isfinite(ours).all() and not torch.equal(ours, dense)
    check_ranks(task.family, compressed)
    if errors is not None:
        for report, expected in zip(compressed.layers, errors(method, task, compressed), strict=True):
            reported = {name: report["relative_error"][name] for name in expected}
            assert reported == pytest.approx(expected, rel=2e-3, abs=1e-6)
    return compressed


def check_ranks(family: Family, compressed: Compressed) -> None:
    """The ranks in the report are those of the model."""
    for report, shape in zip(compressed.layers, layer_shapes(compressed.model.config), strict=False):
        for name, rank in report.get("ranks", {}).items():
            if name in SIZES and not (name == "mlp" and shape.linear_ranks):
                assert getattr(shape, SIZES[name]) == rank
            elif name not in SIZES:
                assert shape.linear_ranks[getattr(family, f"{name}_path")] == rank


def check_what_decides(method: Method, form: str, *, data: bool = True, seed: bool = False) -> None:
    """The same task gives the same weights; other calibration tokens (where it reads ``data``) and another seed (where
    it draws) give others, and otherwise the same.
    """
    task = task_of(dense_model(form), 0.3)
    calibration = task.calibration
    other = replace(calibration, tokens=replace(calibration.tokens, ids=calibration.tokens.ids.flip(1)))
    first, same, elsewhere, reseeded = (
        method.compress(each).model.state_dict()
        for each in (task, task, replace(task, calibration=other), replace(task, seed=task.seed + 1))
    )

    def equal(weights: dict[str, Tensor]) -> bool:
        return first.keys() == weights.keys() and all(torch.equal(first[name], weights[name]) for name in first)

    assert equal(same)
    assert equal(elsewhere) == (not data)
    assert equal(reseeded) == (not seed)


def check_saved_and_generating(method: Method, form: str, sparsity: float, directory: Path) -> None:
    """The compressed model survives a round trip to disk, and generates the same with its cache as without."""
    compressed = method.compress(task_of(dense_model(form), sparsity)).model
    compressed.save_pretrained(directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory).eval()
    for parameter in loaded.parameters():
        # In a mapped file a weight may begin anywhere. The product of a matrix and one vector (an expert that sees one
        # token) is summed in another order where that is no multiple of 16 bytes; of more vectors, not.
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, compressed(tokens()).logits)
    check_generating(compressed)


def check_generating(model) -> None:
    """Greedy generation with the cache gives what it gives without."""
    cached, uncached = (
        model.generate(tokens(), max_new_tokens=6, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


@dataclass
class Seen:
    """What one forward shows of a layer: every linear's input and output by role, and what the attention is called
    with.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    attention: tuple[tuple[Tensor, ...], dict[str, Any]] = ((), {})

    def mixed(self, value: Tensor) -> Tensor:
        """``value`` (batch, heads, sequence, v) mixed by this layer's attention, in the form of its output."""
        (query, key, _, *more), options = self.attention
        if query.shape[1] != value.shape[1] and not options.get("enable_gqa"):
            value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return scaled_dot_product_attention(query, key, value, *more, **options)


def seen(model: PreTrainedModel, family: Family, ids: Tensor, forced: Sequence[Seen] | None = None) -> list[Seen]:
    """A forward over ``ids``; where ``forced``, every linear that reads a layer's norms reads what it read there."""
    found = [Seen() for _ in decoder_layers(model)]
    calls = iter(found)

    def before(layer: int, role: str, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        found[layer].inputs[role] = args[0]
        if forced is None or role not in READERS:
            return None
        return (forced[layer].inputs[role].reshape(args[0].shape),)

    def attend(*args: Any, **options: Any) -> Tensor:
        next(calls).attention = (args, options)
        return scaled_dot_product_attention(*args, **options)

    with ExitStack() as hooks, torch.no_grad():
        for index, layer in enumerate(decoder_layers(model)):
            of_experts = () if family.experts_path is None else ("gate", "up", "down")
            for role in {*READERS, "output", "down"} - {*of_experts}:
                if (linear := getattr(family, role)(layer)) is not None:
                    pre = linear.register_forward_pre_hook(lambda _, args, i=index, r=role: before(i, r, args))
                    post = linear.register_forward_hook(
                        lambda _, __, out, i=index, r=role: found[i].outputs.__setitem__(r, out)
                    )
                    hooks.callback(pre.remove)
                    hooks.callback(post.remove)
        hooks.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", attend))
        model(ids, use_cache=False)
    return found


def share_lost(dense: Tensor, reduced: Tensor) -> float:
    """Squared error over energy."""
    dense, reduced = dense.detach().double(), reduced.detach().double()
    return float((dense - reduced).square().sum() / dense.square().sum())


def module_errors(method: Method, task: CompressionTask, compressed: Compressed) -> list[dict[str, float]]:
    """Of each layer, what its modules lose on the dense model's own activations, from explicit states.

    mlp: of its output. query_key: of the logits of all pairs of tokens (of heads with norms, whose estimates have an
    error of their own: as the dense norms leave the dims that the model kept). value_output: of what every query head
    adds, from the values, or from the values as the attention mixes them where the decomposition looks at those.
    """
    assert isinstance(method, MoDeGPT)
    family, ids = task.family, task.calibration.tokens.ids
    dense = seen(task.model, family, ids)
    small = seen(compressed.model, family, ids, forced=dense)
    variant = method.value_output
    mixed = variant is not None and "value_output.A" in variant.required
    layers = zip(decoder_layers(task.model), decoder_layers(compressed.model), dense, small, strict=True)
    errors = []
    for whole, cut, ours, theirs in layers:
        b_D = family.downs(whole)[0].bias
        normed = read_query_key(family, whole).norm_Q is not None
        pairs = getattr(family.attention(cut), "rope_index", None) if normed else None
        errors.append(
            {
                "query_key": share_lost(_logits(ours), _logits(theirs) if pairs is None else _logits(ours, pairs)),
                "value_output": share_lost(
                    _added(family, whole, ours, ours, mixed=mixed), _added(family, cut, theirs, ours, mixed=mixed)
                ),
            }
        )
        if family.experts_path is not None:
            continue  # their error is of each expert on its own tokens: tests/decompositions/test_experts.py
        if family.down_path not in layer_shapes(compressed.model.config)[len(errors) - 1].linear_ranks:
            without = [each.outputs["down"] - (0 if b_D is None else b_D) for each in (ours, theirs)]
            errors[-1]["mlp"] = share_lost(*without)
    return errors


def _logits(layer: Seen, pairs: Tensor | None = None) -> Tensor:
    """(H, T, T) of all queries with all keys, of whatever window; of the rotary ``pairs`` (H_kv, k) of a head alone."""
    (query, key, *_), _ = layer.attention
    query, key = (states.transpose(0, 1).flatten(1, 2).double() for states in (query, key))
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    if pairs is not None:
        dims = torch.cat([pairs, pairs + key.shape[-1] // 2], dim=1)
        kept = torch.zeros(len(pairs), key.shape[-1], dtype=key.dtype).scatter(1, dims, 1.0)
        key = key * kept.repeat_interleave(len(key) // len(pairs), dim=0).unsqueeze(1)
    return query @ key.mT


def _added(family: Family, layer: Any, own: Seen, dense: Seen, *, mixed: bool) -> Tensor:
    """(H, T, d_h): what each query head adds to the stream, without biases, mixed as in the ``dense`` layer or not."""
    num_heads = dense.attention[0][0].shape[1]
    values, bias = own.outputs["value"], family.value(layer).bias
    W_O = family.output(layer).weight.T.unflatten(0, (num_heads, -1)).double()
    values = (values if bias is None else values - bias).unflatten(-1, (-1, W_O.shape[1])).transpose(1, 2)
    if mixed:
        values = dense.mixed(values)
    values = values.repeat_interleave(num_heads // values.shape[1], dim=1)
    return values.transpose(0, 1).flatten(1, 2).double() @ W_O


def linear_errors(metric: Callable[[Tensor], Tensor]) -> Errors:
    """For methods that store every linear as two factors A B: ``tr(E^T M E) / tr(W^T M W)``, ``E = W - A B`` and
    ``M = metric(x^T x)`` of the linear's inputs x in the dense model.
    """

    def errors(method: Method, task: CompressionTask, compressed: Compressed) -> list[dict[str, float]]:
        family = task.family
        found: list[dict[str, float]] = []
        dense = seen(task.model, family, task.calibration.tokens.ids)
        for whole, cut, states in zip(decoder_layers(task.model), decoder_layers(compressed.model), dense, strict=True):
            found.append({})
            for role, inputs in states.inputs.items():
                x, factored = inputs.reshape(-1, inputs.shape[-1]).double(), getattr(family, role)(cut)
                W = getattr(family, role)(whole).weight.T.double()
                E = W - factored.A.weight.T.double() @ factored.B.weight.T.double()
                M = metric(x.T @ x)
                found[-1][role] = float((E * (M @ E)).sum() / (W * (M @ W)).sum())
        return found

    return errors
