"""The protocol between the main job and every compression method, ours and the baselines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modegpt.allocation.engines import ENGINES
from modegpt.allocation.ranks import RankPlan
from modegpt.calibration.cache import StatisticsCache
from modegpt.calibration.calibration import Calibration
from modegpt.calibration.stream import HiddenStates
from modegpt.calibration.world import World
from modegpt.config import (
    TARGETS,
    CompressionConfig,
    DecompositionConfig,
    ModuleSparsity,
    RankMultiple,
    build,
    decisive,
    spelled,
)
from modegpt.cost.metering import CostMeter
from modegpt.data.tokens import CalibrationTokens
from modegpt.errors import UserError
from modegpt.models import Family, LayerShape, family_of, is_compressed
from modegpt.progress import Progress


@dataclass(frozen=True)
class CompressionTask:
    """What a method is given.

    Args:
        calibration: the dense model (eval mode, on its device, not to be modified), its calibration tokens,
            and where progress and cost are reported (``calibration.progress``, ``calibration.meter``).
        sparsity: share of the block-linear weights to remove, in [0, 1).
        seed: of everything random in the method; use ``generator()``.
    """

    calibration: Calibration
    sparsity: float
    seed: int = 0

    @property
    def model(self) -> PreTrainedModel:
        """The dense model."""
        return self.calibration.model

    @property
    def family(self) -> Family:
        """Its family."""
        return self.calibration.family

    def generator(self) -> torch.Generator:
        """A fresh CPU generator seeded with ``seed``."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Compressed:
    """What a method returns.

    Args:
        model: the smaller model; shares tensors it did not change with the dense one.
        layers: one JSON-able report a dense layer: ``index``, ``ranks``, ``relative_error``, ``numerics``, as far as
            they apply.
        influence: block influence of every layer where it was measured.
        details: JSON-able facts of the method's own (e.g. which layers were dropped, slicing fraction).
        warnings: what a reader of the result should know, one line each.
        files: what a checkpoint of the model carries beside it, by file name: a function that writes it to a path.
        outer: tensors outside the layers that are not the dense model's, by name; ``model`` has them where it has data.
        target: what was asked for in bytes or speed, and what came of it (see ``targets.py``); not the method's to
            fill.
        recovery: what was trained afterwards, and the scores before it (see ``recovery/job.py``); nor is this.
    """

    model: PreTrainedModel
    layers: list[dict[str, Any]]
    influence: list[float] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    files: dict[str, Callable[[Path], None]] = field(default_factory=dict)
    outer: dict[str, Tensor] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    recovery: dict[str, Any] | None = None


class Method:
    """A compression method: a dataclass whose fields are its hyper-parameters, which says itself what a run of it is.

    A field that ``method.FIELD`` does not set says with ``metadata={"key": ...}`` where the configuration sets it. One
    that is younger than the first records says with ``metadata={"before": value}`` what runs did before it
    (``config.decisive``).
    """

    name: ClassVar[str]
    """Of the method in the configuration: ``method=NAME``."""
    reads: ClassVar[frozenset[str]] = frozenset({"sparsity"})
    """The options of ``compression`` that it reads; it refuses the others."""
    shared: ClassVar[bool] = False
    """Several processes can share it: all it asks of the data is statistics that are sums."""
    streamed: ClassVar[bool] = False
    """It can go layer by layer from disk to disk."""
    experts: ClassVar[bool] = False
    """It can compress mixtures of experts."""
    revision: ClassVar[int] = 1
    """Raised when a mended method removes something else than before: its runs are then others than the old ones."""
    retired: ClassVar[Mapping[str, Any]] = {}
    """Options that were taken out, at the value that is left of them: identities name them as they always did."""

    @classmethod
    def configured(
        cls,
        options: Mapping[str, Any],
        *,
        compression: CompressionConfig,
        decomposition: DecompositionConfig,
        allocation: Mapping[str, Any],
    ) -> Self:
        """The method that a run's configuration describes.

        Each argument is the part of the configuration of that name; ``options`` is ``method``.

        Raises UserError for unknown options, values of the wrong type, and what would have no effect.
        """
        default = CompressionConfig()
        for option in fields(CompressionConfig):
            ignored = option.name not in cls.reads | TARGETS
            if ignored and getattr(compression, option.name) != getattr(default, option.name):
                raise UserError(f"compression.{option.name} has no effect with method={cls.name}; leave it out")
        elsewhere = cls.elsewhere(compression=compression, decomposition=decomposition, allocation=allocation)
        return build({cls.name: cls}, options, "method", **elsewhere)

    @classmethod
    def elsewhere(
        cls, *, compression: CompressionConfig, decomposition: DecompositionConfig, allocation: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The fields that ``method.FIELD`` does not set, by name. Raises UserError as ``configured`` does."""
        return {}

    def choices(self) -> dict[str, Any]:
        """The parts of a run's configuration that choose an implementation, with every option."""
        return {"method": spelled({self.name: type(self)}, self)}

    def identity(self, *, sparsity: float, seed: int, family: Family | None = None) -> dict[str, Any]:
        """What of a run's configuration decides what the method does at ``sparsity`` with ``seed``, ready for JSON.

        To a model of ``family``, where one is named.
        """
        revision = self.revision_for(family)
        return {
            "method": decisive({self.name: type(self)}, self)
            | dict(self.retired)
            | ({"revision": revision} if revision > 1 else {}),
            "seed": seed,
            "compression": {"sparsity": sparsity},
        }

    def revision_for(self, family: Family | None) -> int:
        """``revision``, or a later one where what was mended concerns this family and not all."""
        return self.revision

    def applicable(self, family: Family) -> str | None:
        """Why this method cannot compress ``family``, or None."""
        if family.experts_path is not None and not self.experts:
            return f"{self.name} does not know mixtures of experts; docs/families.md lists the methods that do"
        return None

    def check(self, task: CompressionTask) -> None:
        """Raise UserError, before any expensive work, for a task that cannot be done."""

    def required_statistics(self, family: Family) -> frozenset[str]:
        """Names of the statistics of a layer that the calibration keeps for it, in memory and in the cache."""
        return frozenset()

    def foresee(self, task: CompressionTask, influence: Sequence[float]) -> list[str]:
        """What a user should be warned of where the layers have this block influence, measured or estimated."""
        return []

    def compress(self, task: CompressionTask) -> Compressed:
        """Compress ``task.model`` to ``task.sparsity``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Begun:
    """What a method decides before it goes through the layers, ready for JSON."""

    plan: RankPlan
    influence: list[float] | None = None


Reduced = tuple[LayerShape, dict[str, Tensor], dict[str, Any]]
"""A layer's new shape, the tensors that changed, named as by ``layer_tensors``, and its report."""


class LayerWalk(Protocol):
    """A compression on its way through the layers, in front of one.

    The rest depends on the ``streams``, the ``generator`` and ``moved``, whether a layer was changed, beside the model.
    """

    moved: bool

    @property
    def streams(self) -> dict[str, HiddenStates]:
        """The hidden states there, by name; behind the last layer those that ``finish`` needs."""

    @property
    def generator(self) -> torch.Generator:
        """Of all that is random."""

    def layer(self, index: int, layer: nn.Module) -> Reduced:
        """Reduce the dense ``layer``, the next one, which has its weights. The streams move on."""

    def finish(self, model: PreTrainedModel, reports: list[dict[str, Any]]) -> Compressed:
        """The result, all layers being done: ``model`` is made of them, but for ``Compressed.outer``."""


@dataclass(frozen=True, kw_only=True)
class RankMethod(Method):
    """A method that reduces modules to integer ranks, which ``compression`` rules.

    Args:
        module_sparsity: a module's own sparsity instead of its layer's.
        rank_multiple: kept ranks are multiples of this, by module.
        budget: ``"exact"`` or ``"nearest"``, see ``allocation.ranks.integer_ranks``.
        skip_layers: layers left dense.
        engine: whose sizes the ranks keep to, by its name in ``allocation.engines.ENGINES``.
    """

    reads: ClassVar[frozenset[str]] = frozenset(
        {"sparsity", "module_sparsity", "rank_multiple", "budget", "skip_layers", "engine"}
    )

    module_sparsity: dict[str, float | None] = field(
        default_factory=dict, metadata={"key": "compression.module_sparsity"}
    )
    rank_multiple: dict[str, int] = field(default_factory=dict, metadata={"key": "compression.rank_multiple"})
    budget: str = field(default="exact", metadata={"key": "compression.budget"})
    skip_layers: tuple[int, ...] = field(default=(), metadata={"key": "compression.skip_layers"})
    engine: str = field(default="any", metadata={"key": "engine"})

    @property
    def whole(self) -> tuple[str, ...]:
        """Modules that keep their full size for the engine."""
        return ENGINES[self.engine].whole

    def likely_shapes(self, task: CompressionTask, influence: Sequence[float]) -> list[LayerShape]:
        """The layers as they are likely to become, for what depends on sizes alone and is asked before the start.

        ``influence``: of each layer on some tokens. Raises UserError for ranks that cannot be.
        """
        raise NotImplementedError

    @property
    def rules(self) -> dict[str, Any]:
        """What rules the ranks, as the fields of any method of this kind."""
        return {option.name: getattr(self, option.name) for option in fields(RankMethod)}

    @classmethod
    def elsewhere(
        cls, *, compression: CompressionConfig, decomposition: DecompositionConfig, allocation: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What ``compression`` says about ranks."""
        return {
            "module_sparsity": asdict(compression.module_sparsity),
            "rank_multiple": asdict(compression.rank_multiple),
            "budget": compression.budget,
            "skip_layers": tuple(compression.skip_layers),
            "engine": compression.engine,
        }

    def identity(self, *, sparsity: float, seed: int, family: Family | None = None) -> dict[str, Any]:
        """With all that rules the ranks."""
        ranks = {
            "module_sparsity": asdict(ModuleSparsity()) | self.module_sparsity,
            "rank_multiple": asdict(RankMultiple(1, 1, 1)) | self.rank_multiple,
            "budget": self.budget,
            "skip_layers": list(self.skip_layers),
            "layer_sparsity": None,
        }
        if self.engine != "any":  # as every run did before there was a choice
            ranks["engine"] = self.engine
        return super().identity(sparsity=sparsity, seed=seed, family=family) | {
            "compression": {"sparsity": sparsity, **ranks}
        }


class LayerByLayer(RankMethod):
    """A method that goes through the layers once, after what it decides beforehand, and so needs one at a time."""

    streamed: ClassVar[bool] = True

    @property
    def whole_model(self) -> str | None:
        """The option of this method, if there is one, that needs the whole model at once."""
        return None

    def begin(self, task: CompressionTask) -> Begun:
        """Decide on ranks."""
        raise NotImplementedError

    def walk(self, task: CompressionTask, begun: Begun, first: int = 0) -> LayerWalk:
        """Set out from layer ``first``, with hidden states in front of layer 0 to be replaced where it is another."""
        raise NotImplementedError


def whole_model(method: Method | None) -> str | None:
    """The option of ``method``, if there is one, that needs the whole model at once, in one process."""
    return method.whole_model if isinstance(method, LayerByLayer) else None


def make_task(
    method: Method,
    model: PreTrainedModel,
    tokens: CalibrationTokens,
    *,
    method_name: str,
    sparsity: float,
    seed: int,
    batch_size: int,
    precision: str,
    cache: StatisticsCache | None = None,
    progress: Progress,
    meter: CostMeter,
    world: World | None = None,
) -> CompressionTask:
    """The task of compressing ``model`` by ``method``.

    Args:
        sparsity: share of the block-linear weights to remove, in [0, 1).
        seed: of what is random in the method.
        batch_size: calibration windows in one forward pass.
        precision: ``"float64"`` or ``"float32"``, of the products inside the Gram matrices.

    Raises UserError when the model is compressed already, or ``method`` cannot compress it.
    """
    family = family_of(model.config)
    if is_compressed(model.config):
        raise UserError(
            "the model is compressed already; score it with method=dense, or compress the dense model it was made of"
        )
    if (reason := method.applicable(family)) is not None:
        raise UserError(f"method={method_name} cannot compress {family.model_type} models: {reason}")
    calibration = Calibration(
        model=model,
        tokens=tokens,
        batch_size=batch_size,
        precision=getattr(torch, precision),
        cache=cache,
        progress=progress,
        meter=meter,
        world=world or World(),
    )
    task = CompressionTask(calibration=calibration, sparsity=sparsity, seed=seed)
    method.check(task)
    return task
