"""Walking a decoder layer by layer: hidden states flow on, one layer works at a time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modegpt.cost.work import Alike
from modegpt.decompositions.linalg import all_finite
from modegpt.errors import UserError
from modegpt.models import decoder_layers


@dataclass
class HiddenStates:
    """The residual stream of every calibration batch in front of one layer.

    ``batches[b]`` is (batch, sequence_length, d_h); ``arguments[l][batch size]`` holds what the model
    passes to layer ``l`` beside the hidden states (rotary embedding, attention mask), which depends on
    nothing but the batch size because calibration windows are unpadded and of one length.
    """

    batches: list[Tensor]
    arguments: list[dict[int, dict[str, Any]]]

    def layer_arguments(self, index: int, batch: Tensor) -> dict[str, Any]:
        """What layer ``index`` gets beside the hidden states ``batch``."""
        return self.arguments[index][batch.shape[0]]


@dataclass
class Storage:
    """Where the layers of ``model``, and hidden states between them, are until they are needed: here, all in memory.

    Whoever goes through a model by way of its storage also does where both are on disk.
    """

    model: PreTrainedModel

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        """Decoder layer ``index``, which has its weights inside. One layer at a time."""
        return nullcontext(decoder_layers(self.model)[index])

    def outer(self, *, head: bool) -> AbstractContextManager[PreTrainedModel]:
        """The model, which inside has all weights outside its layers, and those of the ``head`` where that is wanted.

        Not inside ``layer``.
        """
        return nullcontext(self.model)

    def batches(self) -> list[Tensor]:
        """A list for a tensor a batch, still empty: it is appended to, read, and its members are replaced."""
        return []

    def embed(self, tokens: Tensor, *, batch_size: int) -> HiddenStates:
        """``tokens`` (num_samples, sequence_length) in front of layer 0."""
        with self.outer(head=False) as model:
            return embed(model, tokens, batch_size=batch_size, batches=self.batches())


@contextmanager
def layers_replaced(layers: nn.ModuleList, stand_in: Callable[[int], Callable]) -> Iterator[None]:
    """Inside, the forward of layer i is ``stand_in(i)``."""
    for index, layer in enumerate(layers):
        layer.forward = stand_in(index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def yielding(x: Tensor) -> Callable[[int], Callable[..., Tensor]]:
    """What makes every layer give ``x``, for ``layers_replaced``."""
    return lambda _: lambda *_args, **_kwargs: x


@torch.no_grad()
def embed(
    model: PreTrainedModel, tokens: Tensor, *, batch_size: int, batches: list[Tensor] | None = None
) -> HiddenStates:
    """The hidden states entering layer 0, and the arguments of every layer.

    The model's own forward runs with each layer replaced by a recorder that passes its input through,
    so embeddings, positions and masks are the family's own. ``tokens``: (num_samples, sequence_length).
    ``batches``: an empty list for the hidden states; None: a new one.
    """
    layers = decoder_layers(model)
    batches = [] if batches is None else batches
    arguments: list[dict[int, dict[str, Any]]] = [{} for _ in layers]

    def recorder(index: int) -> Callable:
        def record(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            arguments[index].setdefault(hidden_states.shape[0], kwargs)
            if index == 0:
                batches.append(hidden_states)
            return hidden_states

        return record

    with layers_replaced(layers, recorder):
        for batch in tokens.split(batch_size) if len(tokens) else ():
            model.base_model(batch.to(model.device), use_cache=False)
    return HiddenStates(batches=batches, arguments=arguments)


@torch.no_grad()
def advance(
    hidden: HiddenStates,
    index: int,
    layer: Callable[..., Any],
    observe: Callable[[Tensor, Tensor], None] | None = None,
) -> None:
    """Run ``layer`` (number ``index``) on every batch, replacing each hidden state by its output.

    ``observe(x_in, x_out)`` sees each batch's residual stream entering and leaving.
    Raises UserError naming the layer when an activation is not finite.
    """
    alike = Alike()
    for b, x_in in enumerate(hidden.batches):
        with alike.forward(x_in.shape):
            x_out = layer(x_in, **hidden.layer_arguments(index, x_in))
        if not all_finite(x_out):
            raise UserError(
                f"calibration found NaN or inf in the activations leaving decoder layer {index}; "
                "check the weights and the dtype (bfloat16 or float32 instead of float16)"
            )
        if observe is not None:
            observe(x_in, x_out)
        hidden.batches[b] = x_out
