"""Gradients of the calibration loss, in micro-batches, with their passes counted, for the methods that need them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from modegpt.calibration.calibration import Calibration
from modegpt.cost.work import forward


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
    """Summed negative log-likelihood of all tokens but the first of each window, a scalar; ids (windows, length)."""
    with forward():
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")


def in_micro_batches(calibration: Calibration, stage: str, batch_size: int, step: Callable[[Tensor], None]) -> None:
    """Give ``step`` the calibration windows, ``batch_size`` at a time: a forward and a backward pass over each."""
    ids, meter = calibration.tokens.ids, calibration.meter
    for batch in calibration.progress.track(ids.split(batch_size), stage, unit="batch"):
        with meter.stage(stage, counted=True):
            step(batch.to(calibration.model.device))
        meter.forward_passes += len(batch) / len(ids)
        meter.backward_passes += len(batch) / len(ids)
    meter.calibration_tokens = calibration.tokens.num_tokens


def weight_gradients(calibration: Calibration, weights: list[nn.Parameter], *, batch_size: int) -> list[Tensor]:
    """Gradient of the mean negative log-likelihood of the calibration windows with respect to each of ``weights``.

    Accumulated over micro-batches in float32 or wider; nothing is left on the model. Zero for what no window reached.
    """
    totals = [torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    ids = calibration.tokens.ids
    num_predicted = ids.shape[0] * (ids.shape[1] - 1)

    def step(batch: Tensor) -> None:
        loss = summed_loss(calibration.model, batch) / num_predicted
        for total, gradient in zip(totals, torch.autograd.grad(loss, weights, materialize_grads=True), strict=True):
            total += gradient

    with differentiable(calibration.model, weights):
        in_micro_batches(calibration, "gradients", batch_size, step)
    return totals
