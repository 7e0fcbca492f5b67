"""The protocol between the main job and every compression method, ours and the baselines."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modegpt.calibration.calibration import Calibration
from modegpt.models import Family


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
        return self.calibration.model

    @property
    def family(self) -> Family:
        return self.calibration.family

    def generator(self) -> torch.Generator:
        """A fresh CPU generator seeded with ``seed``."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Compressed:
    """What a method returns.

    Args:
        model: the smaller model; shares tensors it did not change with the dense one.
        layers: one JSON-able report a dense layer: ``index``, ``ranks``, ``relative_error``, ``numerics``, as far as they apply.
        influence: block influence of every layer where it was measured.
        details: JSON-able facts of the method's own (e.g. which layers were dropped, slicing fraction).
        files: what a checkpoint of the model carries beside it, by file name: a function that writes it to a path.
        recovery: what was trained afterwards, and the scores before it (see ``recovery/job.py``); not the method's to fill.
    """

    model: PreTrainedModel
    layers: list[dict[str, Any]]
    influence: list[float] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Callable[[Path], None]] = field(default_factory=dict)
    recovery: dict[str, Any] | None = None


class Method:
    """A compression method: a dataclass whose fields are its hyper-parameters."""

    def applicable(self, family: Family) -> str | None:
        """Why this method cannot compress ``family``, or None."""
        return None

    def check(self, task: CompressionTask) -> None:
        """Raise UserError, before any expensive work, for a task that cannot be done."""

    def compress(self, task: CompressionTask) -> Compressed:
        """Compress ``task.model`` to ``task.sparsity``."""
        raise NotImplementedError
