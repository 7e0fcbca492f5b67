"""Observing a model on calibration tokens, one layer at a time, once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modegpt.allocation.influence import BlockInfluence
from modegpt.calibration.cache import StatisticsCache
from modegpt.calibration.statistics import LayerObserver, Statistics
from modegpt.calibration.stream import HiddenStates, Storage, advance, embed
from modegpt.calibration.world import ALONE, World
from modegpt.cost.metering import CostMeter
from modegpt.data.tokens import CalibrationTokens
from modegpt.models import decoder_layers, dense_shape, family_of
from modegpt.progress import Progress


@dataclass
class Calibration:
    """A dense model, the tokens it is observed on, and how.

    Args:
        batch_size: windows per forward.
        precision: of each chunk's product in the Gram matrices; sums are always float64.
        cache: where statistics outlive the run, or None (always so among several processes, which must agree on what to
            compute).
        world: the processes that share the windows of ``statistics``.
        overlap: form the sums on a second stream of the GPU, beside the forward. The numbers are the same.
        storage: where the model's layers and hidden states are; None: all in memory.
    """

    model: PreTrainedModel
    tokens: CalibrationTokens
    batch_size: int = 8
    precision: torch.dtype = torch.float64
    cache: StatisticsCache | None = None
    progress: Progress = field(default_factory=Progress)
    meter: CostMeter = field(default_factory=CostMeter)
    world: World = ALONE
    overlap: bool = False
    storage: Storage | None = None

    def __post_init__(self) -> None:
        assert not self.overlap or self.model.device.type == "cuda", "only a GPU has a second stream"
        assert self.cache is None or self.world.size == 1, "processes that share a calibration cannot use the cache"
        self.family = family_of(self.model.config)
        self.stored = self.storage or Storage(self.model)
        self._stream = torch.cuda.Stream(self.model.device) if self.overlap else None

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return len(decoder_layers(self.model))

    def check_activations(self) -> list[float]:
        """Run one window through the layers and return each one's block influence on it.

        Raises UserError naming the first layer whose output is not finite.
        """
        hidden = embed(self.model, self.tokens.ids[:1], batch_size=1)
        influence = [BlockInfluence() for _ in range(self.num_layers)]
        for index, layer in enumerate(decoder_layers(self.model)):
            advance(hidden, index, layer, observe=influence[index].update)
        return [of_layer.value() for of_layer in influence]

    def share(self, *, even: bool = False) -> list[Tensor]:
        """The batches of tokens of this process; ``even``: as many as the others have, see ``World.share``."""
        return self.world.share(self.tokens.ids.split(self.batch_size), "calibration batches", even=even)

    def embed(self, *, even: bool = False) -> HiddenStates:
        """What ``share`` gives, in front of layer 0."""
        return self.stored.embed(torch.cat(self.share(even=even)), batch_size=self.batch_size)

    def block_influence(self, also: frozenset[str] = frozenset()) -> Tensor:
        """Block influence of every layer, (L,) float64.

        Where a cache is at hand the statistics ``also`` that the caller will ask for next are collected
        in the same pass and kept there; otherwise only cosines are, so that one layer's statistics live at a time.
        """
        names = frozenset({"layer.influence"}) | (also if self.cache is not None else frozenset())
        loop = "block influence and statistics" if len(names) > 1 else "block influence"
        return torch.stack(
            [statistics["layer.influence"].cpu() for statistics in self.statistics(names, stage="influence", loop=loop)]
        )

    def statistics(
        self,
        names: frozenset[str],
        *,
        stage: str = "statistics",
        loop: str = "statistics",
        only: Sequence[int] | None = None,
    ) -> Iterator[Statistics]:
        """Yield each layer's statistics in order, while it has its weights; the last one's are the caller's to drop.

        What the cache holds is read; the model runs only as far as something is missing, in each process on its
        share of the batches, so that every batch is the one that a single process would run. ``loop`` is what the
        caller does with them layer by layer, as progress shows it. ``only``: layers that have any; None: all.
        """
        layers = decoder_layers(self.model)
        hidden: HiddenStates | None = None
        position = 0
        for index in self.progress.track(range(self.num_layers), loop, unit="layer"):
            with self.meter.stage(stage, counted=True):
                statistics = {} if self.cache is None else self.cache.load(index, names, device=self.model.device)
                missing = names - statistics.keys() if only is None or index in only else frozenset()
                runs = bool(missing) or index < max(only or (), default=0)
                if runs and hidden is None:
                    hidden = self.embed()
            with self.stored.layer(index):
                if runs:
                    assert hidden is not None
                    with self.meter.stage(stage, counted=True):
                        for skipped in range(position, index):
                            advance(hidden, skipped, layers[skipped])
                        self.meter.forward_passes += (index - position) / self.num_layers
                        observed = self.observe(hidden, index, missing, world=self.world)
                        if self.cache is not None:
                            self.cache.store(index, observed)
                        statistics |= observed
                        position = index + 1
                yield statistics
        self.meter.calibration_tokens = self.tokens.num_tokens

    def observe(self, hidden: HiddenStates, index: int, names: frozenset[str], *, world: World = ALONE) -> Statistics:
        """Run layer ``index`` on ``hidden``, which moves on, and return its statistics ``names``, pooled over
        ``world``.

        Counts as a layer's share of a forward pass.
        """
        layer = decoder_layers(self.model)[index]
        observer = LayerObserver(
            self.family,
            layer,
            head_dim=dense_shape(self.model.config).qk_head_dim,
            names=names,
            precision=self.precision,
            stream=self._stream,
        )
        with observer.watching(next(iter(hidden.arguments[index].values()))):
            advance(hidden, index, layer, observe=observer.residual)
        self.meter.forward_passes += 1 / self.num_layers
        observer.pool(world, num_batches=-(-len(self.tokens.ids) // self.batch_size))
        return observer.result()
