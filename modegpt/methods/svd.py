"""Plain truncated SVD of every weight matrix: the low-rank baseline that looks at no data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.methods.low_rank import (
    Truncation,
    block_linears,
    dense_layers,
    factored_model,
    layer_ranks,
    truncated,
)
from modegpt.models import decoder_layers


@dataclass(frozen=True)
class SVD(Method):
    """Every block-linear W (in, out) becomes its best rank-r approximation in Frobenius norm (Eckart and Young, 1936).

    One sparsity for all matrices; both factors count against it, so ranks start at half of what the
    matrix has before anything is saved. Needs no calibration tokens.
    """

    name: ClassVar[str] = "svd"
    experts: ClassVar[bool] = True

    def compress(self, task: CompressionTask) -> Compressed:
        """Truncate every block-linear weight."""
        if task.sparsity == 0:
            return dense_layers(task)
        ranks = layer_ranks(task)
        return factored_model(task, ranks, self._truncations(task, ranks))

    def _truncations(self, task: CompressionTask, ranks: list[dict[str, int]]) -> Iterator[dict[str, Truncation]]:
        progress, meter = task.calibration.progress, task.calibration.meter
        for layer, of_layer in zip(progress.track(decoder_layers(task.model), "SVD", unit="layer"), ranks, strict=True):
            with meter.stage("solve", counted=True):
                linears = block_linears(task.family, layer)
                truncations = {
                    role: truncated(linear.weight.detach().T, of_layer[role]) for role, linear in linears.items()
                }
            yield truncations
