"""Gradients of the calibration loss, in micro-batches, with their passes counted. Shared by the gradient baselines."""

from collections.abc import Iterable, Iterator
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


def micro_batches(calibration: Calibration, stage: str, batch_size: int) -> Iterator[Tensor]:
    """The calibration windows, ``batch_size`` at a time, each metered as one forward and one backward pass over it.

    A backward pass that needs the gradients of all weights costs twice a forward.
    """
    ids, meter = calibration.tokens.ids, calibration.meter
    for batch in calibration.progress.track(ids.split(batch_size), stage, unit="batch"):
        with meter.stage(stage) as metered:
            yield batch.to(calibration.model.device)
            metered.flops += 3.0 * calibration.num_layers * layer_flops(calibration.model, batch)
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
