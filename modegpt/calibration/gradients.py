"""Gradients of the calibration loss, in micro-batches, with their passes counted, for the methods that need them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from modegpt.calibration.calibration import Calibration, layer_flops


@contextmanager
def differentiable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients flow to exactly ``parameters`` inside; every flag is as before afterwards."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    wanted = set(parameters)
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in wanted)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def summed_loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods of every token but the first of each window, a scalar; ids (windows, length)."""
    logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")


def micro_batches(
    calibration: Calibration, stage: str, batch_size: int, *, of_weights: bool = True
) -> Iterator[Tensor]:
    """The calibration windows, ``batch_size`` at a time, each metered as one forward and one backward pass over it.

    A backward pass that needs the gradients of all weights costs twice a forward, one that needs those of activations alone as much as one.
    """
    ids, meter = calibration.tokens.ids, calibration.meter
    for batch in calibration.progress.track(ids.split(batch_size), stage, unit="batch"):
        with meter.stage(stage) as metered:
            yield batch.to(calibration.model.device)
            metered.flops += (
                (3.0 if of_weights else 2.0) * calibration.num_layers * layer_flops(calibration.model, batch)
            )
            meter.forward_passes += len(batch) / len(ids)
            meter.backward_passes += len(batch) / len(ids)
    meter.calibration_tokens = calibration.tokens.num_tokens


def weight_gradients(calibration: Calibration, weights: list[nn.Parameter], *, batch_size: int) -> list[Tensor]:
    """Gradient of the mean negative log-likelihood of the calibration windows with respect to each of ``weights``.

    Accumulated over micro-batches in float32 or wider; nothing is left on the model.
    """
    totals = [torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    ids = calibration.tokens.ids
    num_predicted = ids.shape[0] * (ids.shape[1] - 1)
    with differentiable(calibration.model, weights):
        for batch in micro_batches(calibration, "gradients", batch_size):
            loss = summed_loss(calibration.model, batch) / num_predicted
            for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
                total += gradient
    return totals


def output_sensitivity(calibration: Calibration, linears: Sequence[nn.Linear], *, batch_size: int) -> list[Tensor]:
    """``||dL/dy_t||^2`` of what each of ``linears`` gives each token t, for the summed negative log-likelihood L of its window.

    Returns one tensor (num_samples, sequence_length), float32, a linear: the trace of the empirical Fisher information of y_t.
    """
    seen: dict[int, Tensor] = {}
    squares: list[list[Tensor]] = [[] for _ in linears]

    def tap(index: int):
        def keep(_: nn.Module, __: object, y: Tensor) -> Tensor:
            seen[index] = y if y.requires_grad else y.detach().requires_grad_()
            return seen[index]

        return keep

    handles = [linear.register_forward_hook(tap(index)) for index, linear in enumerate(linears)]
    try:
        with differentiable(calibration.model, ()):
            for batch in micro_batches(calibration, "token weights", batch_size, of_weights=False):
                loss = summed_loss(calibration.model, batch)
                gradients = torch.autograd.grad(loss, [seen[index] for index in range(len(linears))])
                for kept, gradient in zip(squares, gradients, strict=True):
                    kept.append(gradient.float().square().sum(dim=-1).view_as(batch))
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(kept) for kept in squares]
