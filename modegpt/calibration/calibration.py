"""Observing a model on calibration tokens, one layer at a time, once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modegpt.calibration.cache import StatisticsCache
from modegpt.calibration.moments import CHUNK_ROWS
from modegpt.calibration.statistics import LayerObserver, Statistics
from modegpt.calibration.stream import HiddenStates, advance, embed
from modegpt.calibration.world import World
from modegpt.cost.metering import CostMeter, Stage
from modegpt.cost.work import forward_cost
from modegpt.data.tokens import CalibrationTokens
from modegpt.models import decoder_layers, dense_shape, family_of
from modegpt.progress import Progress


@dataclass
class Calibration:
    """A dense model, the tokens it is observed on, and how.

    Args:
        batch_size: windows per forward.
        precision: of each chunk's product in the Gram matrices; sums are always float64.
        cache: where statistics outlive the run, or None (always so among several processes, which must agree on what to compute).
        world: the processes that share the windows of ``statistics``.
    """

    model: PreTrainedModel
    tokens: CalibrationTokens
    batch_size: int = 8
    precision: torch.dtype = torch.float64
    cache: StatisticsCache | None = None
    progress: Progress = field(default_factory=Progress)
    meter: CostMeter = field(default_factory=CostMeter)
    world: World = World()

    def __post_init__(self) -> None:
        assert self.cache is None or self.world.size == 1, "processes that share a calibration cannot use the cache"
        self.family = family_of(self.model.config)

    @property
    def num_layers(self) -> int:
        return len(decoder_layers(self.model))

    def check_activations(self) -> None:
        """Run one window through the layers. Raises UserError naming the first whose output is not finite."""
        hidden = embed(self.model, self.tokens.ids[:1], batch_size=1)
        for index, layer in enumerate(decoder_layers(self.model)):
            advance(hidden, index, layer)

    def embed(self) -> HiddenStates:
        """The calibration batches in front of layer 0."""
        return embed(self.model, self.tokens.ids, batch_size=self.batch_size)

    def block_influence(self, also: frozenset[str] = frozenset()) -> Tensor:
        """Block influence of every layer, (L,) float64.

        Where a cache is at hand the statistics ``also`` that the caller will ask for next are collected
        in the same pass and kept there; otherwise only cosines are, so that one layer's statistics live at a time.
        """
        names = frozenset({"layer.influence"}) | (also if self.cache is not None else frozenset())
        return torch.stack(
            [statistics["layer.influence"].cpu() for statistics in self.statistics(names, stage="influence")]
        )

    def statistics(self, names: frozenset[str], *, stage: str = "statistics") -> Iterator[Statistics]:
        """Yield each layer's statistics in order; the previous layer's are the caller's to drop.

        What the cache holds is read; the model runs only as far as something is missing, in each process on its
        share of the batches, so that every batch is the one that a single process would run.
        """
        layers = decoder_layers(self.model)
        batches = self.world.share(self.tokens.ids.split(self.batch_size), "calibration batches")
        hidden: HiddenStates | None = None
        position = 0
        description = "block influence" if names == {"layer.influence"} else "statistics"
        for index in self.progress.track(range(self.num_layers), description, unit="layer"):
            with self.meter.stage(stage) as metered:
                statistics = {} if self.cache is None else self.cache.load(index, names, device=self.model.device)
                missing = names - statistics.keys()
                if missing:
                    if hidden is None:
                        hidden = embed(self.model, torch.cat(batches), batch_size=self.batch_size)
                    for skipped in range(position, index):
                        advance(hidden, skipped, layers[skipped])
                    observed = self.observe(hidden, index, missing, world=self.world)
                    if self.cache is not None:
                        self.cache.store(index, observed)
                    statistics |= observed
                    self.account(metered, batches, observed, share=(index + 1 - position) / self.num_layers)
                    position = index + 1
            yield statistics
        self.meter.calibration_tokens = self.tokens.num_tokens

    def observe(self, hidden: HiddenStates, index: int, names: frozenset[str], *, world: World = World()) -> Statistics:
        """Run layer ``index`` on ``hidden``, which moves on, and return its statistics ``names``, pooled over ``world``."""
        layer = decoder_layers(self.model)[index]
        observer = LayerObserver(
            self.family,
            layer,
            head_dim=dense_shape(self.model.config).qk_head_dim,
            names=names,
            precision=self.precision,
        )
        with observer.watching(next(iter(hidden.arguments[index].values()))):
            advance(hidden, index, layer, observe=observer.residual)
        observer.pool(world)
        return observer.result()

    def account(self, metered: Stage, batches: Sequence[Tensor], observed: Statistics, *, share: float) -> None:
        """Count what it took to run ``share`` of the layers on ``batches`` of tokens and to sum the Gram matrices in ``observed``."""
        cost, num_tokens = forward_cost(self.model), sum(batch.numel() for batch in batches)
        for batch in batches:
            metered.add(
                "forward", cost.dtype, flops=share * cost.flops(*batch.shape), bytes=share * cost.bytes(*batch.shape)
            )
        metered.add(
            "gram",
            self.precision,
            flops=gram_flops(observed, num_tokens),
            bytes=gram_bytes(observed, num_tokens, self.precision),
        )
        self.meter.forward_passes += share


def gram_flops(statistics: Statistics, num_tokens: int) -> float:
    """Multiply-adds, twice, of the Gram matrices in ``statistics``, as if each entry were computed (by symmetry half of them need be)."""
    return sum(2.0 * num_tokens * value.numel() for value in _grams(statistics))


def gram_bytes(statistics: Statistics, num_tokens: int, precision: torch.dtype) -> float:
    """Least traffic of the Gram matrices: rows read once in float32, half the float64 sum read and written a chunk."""
    num_chunks = -(-num_tokens // CHUNK_ROWS[precision])
    return sum(
        4.0 * num_tokens * value.shape[:-1].numel() + 8.0 * num_chunks * value.numel() for value in _grams(statistics)
    )


def _grams(statistics: Statistics) -> list[Tensor]:
    return [value for value in statistics.values() if value.ndim >= 2 and value.shape[-1] == value.shape[-2]]


def layer_flops(model: PreTrainedModel, ids: Tensor) -> float:
    """FLOPs of one average decoder layer over ``ids`` (num_samples, sequence_length), see ``work.ForwardCost``."""
    return forward_cost(model).flops(*ids.shape) / len(decoder_layers(model))
