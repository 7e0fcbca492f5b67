"""The steps of a run that need a model's weights: one interface, and the implementation with whole models in memory.

``streaming/job.py`` implements the same steps for models that stay on disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.config import ModelConfig
from modegpt.evaluation.begun import Begun
from modegpt.evaluation.evaluate import PreparedEvaluation, evaluate
from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.models.checkpoints import load_model, save_checkpoint, write_card
from modegpt.models.integrity import check_finite, fingerprint_weights
from modegpt.progress import Progress

Scores = dict[str, dict]
"""What ``evaluation.evaluate.evaluate`` returns."""


@dataclass(frozen=True)
class Target:
    """Where the compressed model goes, with its tokenizer; ``directory`` is None where it is not saved.

    ``decides``: everything that decides the result; ``run``: its identity (see ``records.store.identity``).
    """

    directory: Path | None
    tokenizer: PreTrainedTokenizerBase
    decides: Mapping[str, Any]
    run: str


class Backend(Protocol):
    """A dense model, and what a run does with it and with the compressed model made of it.

    ``model`` has every shape; whether it holds its data is the backend's own business.
    """

    @property
    def model(self) -> PreTrainedModel:
        """The dense model."""

    def fingerprint(self) -> str:
        """SHA-256 of the dense weights, see ``models.integrity.fingerprint_weights``."""

    def check(self, method: Method | None, task: CompressionTask | None, evaluation: PreparedEvaluation) -> None:
        """Refuse with a UserError, before any work, what cannot be done."""

    def score(self, evaluation: PreparedEvaluation, *, progress: Progress, begun: Begun) -> Scores:
        """The dense model's scores, from what an interrupted start has ``begun``."""

    def compress(self, method: Method, task: CompressionTask, target: Target) -> Compressed:
        """Run ``method``, and check that the compressed model's weights are finite."""

    def score_compressed(
        self, compressed: Compressed, evaluation: PreparedEvaluation, *, label: str, progress: Progress, begun: Begun
    ) -> Scores:
        """The compressed model's scores, said under ``label``."""

    def save(self, compressed: Compressed, target: Target, record: Mapping[str, Any]) -> None:
        """Make the compressed model's checkpoint safe, before it is scored; ``record`` is what is known by then."""

    def finish(self, compressed: Compressed, target: Target, record: Mapping[str, Any]) -> None:
        """Have the checkpoint in ``target``, whole or not at all, its card made of the whole ``record``."""


@dataclass(frozen=True)
class InMemory:
    """Whole models in memory."""

    model: PreTrainedModel

    @classmethod
    def open(cls, path: str, wanted: ModelConfig, *, device: str) -> "InMemory":
        """Load the dense model. Raises UserError as ``load_model`` does."""
        return cls(
            load_model(
                path,
                wanted.dtype,
                device,
                wanted.revision,
                device_map=wanted.device_map,
                max_memory=wanted.memory_limits,
            )
        )

    def fingerprint(self) -> str:
        """Hash the weights."""
        return fingerprint_weights(self.model)

    def check(self, method: Method | None, task: CompressionTask | None, evaluation: PreparedEvaluation) -> None:
        """Run one calibration window, and say what it warns of.

        Raises UserError naming the first layer whose output is not finite.
        """
        if method is not None and task is not None:
            for warning in method.foresee(task, task.calibration.check_activations()):
                task.calibration.progress.say(f"warning, by the first calibration window: {warning}")

    def score(self, evaluation: PreparedEvaluation, *, progress: Progress, begun: Begun) -> Scores:
        """Score the dense model."""
        return evaluate(self.model, evaluation, label="dense", progress=progress, begun=begun)

    def compress(self, method: Method, task: CompressionTask, target: Target | None = None) -> Compressed:
        """Run ``method``, part from other processes, and check the weights. Raises UserError for NaN or inf in one."""
        compressed = method.compress(task)
        task.calibration.world.leave()
        check_finite(compressed.model)
        return compressed

    def score_compressed(
        self, compressed: Compressed, evaluation: PreparedEvaluation, *, label: str, progress: Progress, begun: Begun
    ) -> Scores:
        """Score the compressed model."""
        return evaluate(compressed.model, evaluation, label=label, progress=progress, begun=begun)

    def save(self, compressed: Compressed, target: Target, record: Mapping[str, Any]) -> None:
        """Save the compressed model. Raises UserError as ``save_checkpoint`` does."""
        assert target.directory is not None
        save_checkpoint(
            compressed.model, target.tokenizer, target.directory, record, files=compressed.files, run=target.run
        )

    def finish(self, compressed: Compressed, target: Target, record: Mapping[str, Any]) -> None:
        """Write the card again. Raises UserError as ``write_card`` does."""
        assert target.directory is not None
        write_card(compressed.model, target.directory, record)
