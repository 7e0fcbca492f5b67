"""How far a changed model's predictions are from the dense model's, measured layer by layer, in float32 at least."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modegpt.calibration.stream import HiddenStates, Storage, advance, embed, layers_replaced, yielding
from modegpt.cost.work import Alike
from modegpt.models import decoder_layers

StandIns = list[tuple[nn.Module, Callable[..., Any]]]
"""Modules, each with another forward."""

Departure = tuple[int, str, int]
"""A layer, a module of it, and how many of its dims are gone."""

CHUNK_ENTRIES = 2**17
"""About so many log probabilities are compared in float64 at a time: they stay in a processor's cache."""


@contextmanager
def float32_forward(model: nn.Module) -> Iterator[None]:
    """Inside, a half-precision ``model`` computes in float32: each module's own weights are widened for as long as it
    runs.

    Rounding to 8 or 11 bits moves the predictions by more than the removal of a few dims does. Nothing changes for a
    wider model.
    """
    leaves = [
        module
        for module in model.modules()
        if any(parameter.itemsize < 4 for parameter in module.parameters(recurse=False))
    ]
    handles = []
    for module in leaves:
        narrow: dict[str, Tensor] = {}  # while it runs: until then its weights may be on disk
        handles.append(module.register_forward_pre_hook(partial(_widen, narrow)))
        handles.append(module.register_forward_hook(partial(_narrow, narrow), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widen(narrow: dict[str, Tensor], module: nn.Module, _: object) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        narrow[name] = parameter.data
        parameter.data = parameter.data.float()


def _narrow(narrow: dict[str, Tensor], module: nn.Module, *_: object) -> None:
    while narrow:
        name, tensor = narrow.popitem()
        getattr(module, name).data = tensor


@contextmanager
def acting_as(others: StandIns) -> Iterator[None]:
    """Modules with other forwards."""
    for module, other in others:
        vars(module)["forward"] = other
    try:
        yield
    finally:
        for module, _ in others:
            del module.forward


def exact(tensor: Tensor) -> torch.dtype:
    """Float32, or the dtype of ``tensor`` where that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def exact_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A linear map of ``weight`` (out, in), in float32 at least."""
    weight, bias = weight.to(exact(weight)), None if bias is None else bias.to(exact(bias))
    return lambda x: nn.functional.linear(x, weight, bias)


@dataclass(frozen=True)
class Predictions:
    """Of the next token: log_p (predictions, vocabulary), float32 or wider, and p, float64."""

    log_p: Tensor
    p: Tensor

    @classmethod
    def of(cls, log_p: Tensor) -> "Predictions":
        """With the probabilities themselves."""
        return cls(log_p, log_p.double().exp())


@dataclass
class Reference:
    """What the dense ``model`` predicts on some windows, and how far its predictions are from that once it is changed.

    It walks the layers: those before layer ``index`` do not run again. All forwards are in float32 at least.

    Args:
        batches: the windows' tokens, on the model's device.
        hidden: the dense residual stream in front of layer ``index``.
        positions: where in each window predictions are compared; None: everywhere.
        temperature: logits are divided by it.
    """

    model: PreTrainedModel
    batches: list[Tensor]
    hidden: HiddenStates
    positions: Tensor | None
    temperature: float
    dense: list[Predictions] = field(default_factory=list)
    index: int = 0
    alike: Alike = field(default_factory=Alike)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        windows: Tensor,
        *,
        batch_size: int,
        positions: Tensor | None = None,
        temperature: float = 1.0,
    ) -> "Reference":
        """The predictions of ``model`` as it is, on ``windows`` (num_windows, length) of tokens."""
        batches = [batch.to(model.device) for batch in windows.split(batch_size)]
        with float32_forward(model):
            reference = cls(model, batches, embed(model, windows, batch_size=batch_size), positions, temperature)
            alike = Alike()
            reference.dense = [Predictions.of(reference._log_probabilities(batch, {}, alike)) for batch in batches]
        return reference

    def divergence(self, batches: Iterable[int] | None = None) -> float:
        """Mean KL divergence a prediction of the model as it is now from the dense one, in nats.

        ``batches``: numbers of those to look at; None: all.
        """
        layer = decoder_layers(self.model)[self.index]
        total, count = 0.0, 0
        with float32_forward(self.model):
            for number in range(len(self.batches)) if batches is None else batches:
                x, batch, predictions = self.hidden.batches[number], self.batches[number], self.dense[number]
                replaced: dict[int, Callable] = {earlier: _skip for earlier in range(self.index)}
                replaced[self.index] = lambda _, x=x, **arguments: type(layer).forward(layer, x, **arguments)
                total += kl_divergence(predictions, self._log_probabilities(batch, replaced, self.alike))
                count += len(predictions.p)
        return total / count

    def advance(self) -> None:
        """Move on to the next layer, the model being dense again."""
        with float32_forward(self.model):
            advance(self.hidden, self.index, decoder_layers(self.model)[self.index])
        self.index, self.alike = self.index + 1, Alike()

    def restarted(self) -> "Reference":
        """In front of the first layer again, the model being dense."""
        with float32_forward(self.model):
            hidden = embed(self.model, torch.cat(self.batches), batch_size=len(self.batches[0]))
        return replace(self, hidden=hidden, index=0, alike=Alike())

    def _log_probabilities(self, batch: Tensor, replaced: Mapping[int, Callable], alike: Alike) -> Tensor:
        """Of the next token, (batch * positions, vocabulary), with ``replaced[i]`` for the forward of layer i."""
        layers = decoder_layers(self.model)

        def stand_in(index: int) -> Callable:
            return replaced.get(index, partial(type(layers[index]).forward, layers[index]))

        with layers_replaced(layers, stand_in) if replaced else nullcontext():
            return log_probabilities(self.model, batch, self.positions, alike, temperature=self.temperature)


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel, batch: Tensor, positions: Tensor | None, alike: Alike, *, temperature: float = 1.0
) -> Tensor:
    """What ``model`` says of the next token of a ``batch``, (batch * positions, vocabulary)."""
    with alike.forward(batch.shape):
        logits = model(
            batch, use_cache=False, logits_to_keep=0 if positions is None else positions.to(batch.device)
        ).logits
    return logits.float().div(temperature).log_softmax(dim=-1).flatten(0, 1)


@dataclass
class Departures:
    """Models that leave the dense one in one layer each, on their way through the layers, all together.

    So a layer is needed once, however many models there are; what waits in front of it is the hidden states of each.
    All forwards are in float32 at least.

    Args:
        batches: the windows' tokens, on the model's device.
        dense: the residual stream of the dense model.
        changed: those of the others, by what these are called.
    """

    storage: Storage
    batches: list[Tensor]
    dense: HiddenStates
    changed: dict[Departure, HiddenStates] = field(default_factory=dict)

    @classmethod
    def of(cls, storage: Storage, windows: Tensor, *, batch_size: int) -> "Departures":
        """In front of the first layer, on ``windows`` (num_windows, length) of tokens."""
        batches = [batch.to(storage.model.device) for batch in windows.split(batch_size)]
        with float32_forward(storage.model):
            return cls(storage, batches, storage.embed(windows, batch_size=batch_size))

    @torch.no_grad()
    def advance(self, index: int, layer: nn.Module, changes: Iterable[tuple[Departure, StandIns]]) -> None:
        """All go through ``layer`` (number ``index``), and there more leave the dense model, by these ``changes`` each.

        ``layer`` has its weights.
        """
        alike = Alike()
        dense = HiddenStates(self.storage.batches(), self.dense.arguments)
        with float32_forward(layer):
            for stream in self.changed.values():
                self._run(index, layer, stream, stream.batches, alike)
            self._run(index, layer, self.dense, dense.batches, alike)
            for name, change in changes:
                changed = HiddenStates(self.storage.batches(), self.dense.arguments)
                with acting_as(change):
                    self._run(index, layer, self.dense, changed.batches, Alike())
                self.changed[name] = changed
        self.dense = dense

    @staticmethod
    def _run(index: int, layer: nn.Module, stream: HiddenStates, into: list[Tensor], alike: Alike) -> None:
        for b, x in enumerate(stream.batches):
            with alike.forward(x.shape):
                y = layer(x, **stream.layer_arguments(index, x))
            if b < len(into):
                into[b] = y
            else:
                into.append(y)

    def divergences(self, positions: Tensor | None) -> dict[Departure, float]:
        """Behind the last layer: mean KL divergence a prediction of each from the dense model, in nats.

        ``positions``: where in each window predictions are compared; None: everywhere.
        """
        alike, totals, count = Alike(), dict.fromkeys(self.changed, 0.0), 0
        with self.storage.outer(head=True) as model, float32_forward(model):

            def behind(stream: HiddenStates, number: int) -> Tensor:
                with layers_replaced(decoder_layers(model), yielding(stream.batches[number])):
                    return log_probabilities(model, self.batches[number], positions, alike)

            for number in range(len(self.batches)):
                predictions = Predictions.of(behind(self.dense, number))
                count += len(predictions.p)
                for name, stream in self.changed.items():
                    totals[name] += kl_divergence(predictions, behind(stream, number))
        return {name: total / count for name, total in totals.items()}


def _skip(hidden_states: Tensor, **_: Any) -> Tensor:
    return hidden_states


def kl_divergence(dense: Predictions, log_q: Tensor) -> float:
    """Sum over rows of ``KL(p || q)`` in nats, log_q (rows, vocabulary).

    As ``sum p (q/p - 1 - log q/p)`` in float64: no term is negative, so that a divergence far below the rounding of the
    logarithms comes out small, and not as noise of either sign.
    """
    total, rows = 0.0, max(CHUNK_ENTRIES // log_q.shape[-1], 1)
    for p, log_p, log_q_part in zip(dense.p.split(rows), dense.log_p.split(rows), log_q.split(rows), strict=True):
        d = log_q_part.double() - log_p.double()
        total += float(torch.dot(p.flatten(), d.expm1().sub_(d).flatten()))
    return total


def even_positions(length: int, count: int, *, first: int = 0) -> Tensor:
    """``count`` positions of a window from ``first`` on, evenly spaced; the last is the window's last."""
    return first + torch.arange(1, count + 1) * (length - first) // count - 1


MOST_PREDICTIONS = 4096
"""Predictions of many models are compared at no more positions, evenly spaced."""


def few_positions(num_windows: int, length: int, *, first: int = 0) -> Tensor:
    """As many ``even_positions`` of each window as make up ``MOST_PREDICTIONS`` in all, and at least one."""
    return even_positions(length, max(1, min(length - first, MOST_PREDICTIONS // num_windows)), first=first)
