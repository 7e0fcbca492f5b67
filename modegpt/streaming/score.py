"""Perplexity of a model that is never whole in memory."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from modegpt.calibration.stream import advance, layers_replaced
from modegpt.evaluation.begun import Begun
from modegpt.evaluation.perplexity import perplexity
from modegpt.models import decoder_layers
from modegpt.progress import Progress
from modegpt.streaming.hidden import DiskStorage
from modegpt.streaming.model import StreamedModel


def streamed_perplexity(
    streamed: StreamedModel,
    model: PreTrainedModel,
    token_ids: Tensor,
    *,
    window: int,
    batch_tokens: int,
    progress: Progress,
    begun: Begun | None = None,
) -> dict[str, float | int]:
    """``evaluation.perplexity.perplexity``, to the bit, of the model that ``streamed`` holds on disk.

    All windows walk through one layer after the other; the model's own forward then runs from the last layer's output.
    Hidden states of the whole text are held: d_h values a token. ``model`` is the skeleton of ``streamed``. Of what an
    interrupted start has ``begun`` nothing serves.
    """
    assert model is streamed.model
    num_windows, batch_size = token_ids.numel() // window, max(1, batch_tokens // window)
    windows = token_ids[: num_windows * window].view(num_windows, window)
    hidden = DiskStorage(model, streamed).embed(windows, batch_size=batch_size)
    layers = decoder_layers(model)
    for index in progress.track(range(len(layers)), f"windows of {window}, layer by layer", unit="layer"):
        with streamed.layer(index) as layer:
            advance(hidden, index, layer)
    batches = iter(hidden.batches)

    def stand_in(index: int) -> Any:
        return lambda hidden_states, **_: next(batches) if index == len(layers) - 1 else hidden_states

    with streamed.outer(head=True), layers_replaced(layers, stand_in):
        return perplexity(model, token_ids, window=window, batch_tokens=batch_tokens, progress=progress)
