"""What the baselines that drop whole decoder layers share: how many, and the smaller model."""

import math
from typing import Any

from modegpt.methods.base import Compressed, CompressionTask
from modegpt.models import build_compressed, decoder_layers, layer_shapes


def num_dropped_layers(sparsity: float, num_layers: int) -> int:
    """Layers to drop of ``num_layers`` so that their share is nearest to ``sparsity``; at least one stays.

    Half a layer counts as one: at a tie the method removes more than asked rather than less.
    """
    return min(math.floor(sparsity * num_layers + 0.5 + 1e-9), num_layers - 1)


def drop_layers(
    task: CompressionTask, dropped: list[int], *, influence: list[float] | None = None, **details: Any
) -> Compressed:
    """The task's model without the layers ``dropped`` (dense indices, in the order in which they went)."""
    num_layers = len(decoder_layers(task.model))
    kept = [index for index in range(num_layers) if index not in dropped]
    shapes = layer_shapes(task.model.config)
    model = build_compressed(task.model, [shapes[index] for index in kept], [{} for _ in kept], kept_layers=kept)
    layers = [{"index": index, "sparsity": float(index in dropped)} for index in range(num_layers)]
    details |= {"dropped_layers": dropped, "removed_share": len(dropped) / num_layers}
    return Compressed(model, layers, influence=influence, details=details)
