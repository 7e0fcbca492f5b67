"""The steps of a run out of core: the dense model stays on disk, and so does the compressed one while it grows."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from modegpt.backend import Scores, Target
from modegpt.config import ModelConfig, OutOfCoreConfig
from modegpt.cost.machine import measure_ceiling
from modegpt.cost.metering import peak_memory_bytes
from modegpt.errors import UserError
from modegpt.evaluation.begun import Begun
from modegpt.evaluation.evaluate import PreparedEvaluation, evaluate
from modegpt.evaluation.spec import EvaluationSpec
from modegpt.files import json_sha256
from modegpt.methods.base import Compressed, CompressionTask, LayerByLayer, Method, whole_model
from modegpt.models.checkpoints import publish, write_card
from modegpt.progress import Progress
from modegpt.streaming.compress import StreamedCompression
from modegpt.streaming.memory import Prediction, check_fits, gib, predict
from modegpt.streaming.model import StreamedModel
from modegpt.streaming.score import streamed_perplexity
from modegpt.streaming.workspace import Workspace


@dataclass
class OutOfCore:
    """A ``backend.Backend``: the dense model on disk, the memory it will need, and where the checkpoint grows.

    Args:
        prediction, available: the predicted peak of memory and what there is, known after ``check``.
        workspace: the growing checkpoint, from ``compress`` on.
    """

    streamed: StreamedModel
    options: OutOfCoreConfig
    prediction: Prediction | None = None
    available: dict[str, int] | None = None
    workspace: Workspace | None = None

    @classmethod
    def open(cls, path: str, wanted: ModelConfig, *, device: str, options: OutOfCoreConfig) -> "OutOfCore":
        """Open the dense model in ``path``. Raises UserError for what cannot be streamed."""
        return cls(StreamedModel.open(path, dtype=wanted.dtype, device=device), options)

    @property
    def model(self) -> PreTrainedModel:
        """The dense model without its data."""
        return self.streamed.model

    def fingerprint(self) -> str:
        """Hash the weights, read one tensor at a time."""
        return self.streamed.fingerprint()

    def check(self, method: Method | None, task: CompressionTask | None, evaluation: PreparedEvaluation) -> None:
        """Predict the peak of memory, say it, and refuse what does not fit, before any work. Raises UserError."""
        assert isinstance(method, LayerByLayer) and task is not None
        # libraries keep memory from their first products on, which the prediction is to count
        measure_ceiling(str(self.streamed.device), self.model.dtype)
        progress = task.calibration.progress
        self.prediction = predict(method, task, self.streamed, evaluation, on_disk=self.on_disk)
        self.available = check_fits(
            self.prediction,
            task,
            self.streamed,
            on_disk=self.on_disk,
            max_host_bytes=self.options.max_host_bytes,
        )
        for place, parts in self.prediction.record().items():
            spelled = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if name != "total")
            progress.say(
                f"out of core: at most {gib(parts['total'])} of {place} memory expected ({spelled}); "
                f"{gib(self.available[place])} are available"
            )

    @property
    def on_disk(self) -> bool:
        """Whether hidden states wait on disk between layers."""
        return self.options.hidden_states == "disk"

    def score(self, evaluation: PreparedEvaluation, *, progress: Progress, begun: Begun) -> Scores:
        """Score the dense model, layer by layer."""
        return _score(self.streamed, evaluation, label="dense", progress=progress, begun=begun)

    def compress(self, method: Method, task: CompressionTask, target: Target) -> Compressed:
        """Compress into a workspace beside the target, and go on where an earlier process of the same run stopped."""
        assert isinstance(method, LayerByLayer) and target.directory is not None
        progress, settings = task.calibration.progress, self._settings(task, target)
        world = task.calibration.world
        self.workspace = Workspace(target.directory, json_sha256(settings), settings, world)
        for other in self.workspace.others():
            progress.say(
                f"{other} is left of a run with other settings; it is not used (remove it if that run is not wanted)"
            )
        if (position := self.workspace.position()) is not None and position.next_layer:
            progress.say(
                f"going on from layer {position.next_layer} of {task.calibration.num_layers}, "
                f"left in {self.workspace.directory}"
            )
        job = StreamedCompression(method, task, self.streamed, self.workspace, on_disk=self.on_disk)
        compressed, found = job.run()
        if world.leads:
            with task.calibration.meter.stage("saving"):
                job.complete(compressed, target.tokenizer)
        world.meet()
        world.leave()
        compressed.details["out_of_core"] = {
            "hidden_states": self.options.hidden_states,
            "predicted_peak_bytes": self.prediction and self.prediction.record(),
            "available_bytes": self.available,
            "layers_found_finished": found,
        }
        return compressed

    def _settings(self, task: CompressionTask, target: Target) -> dict[str, Any]:
        """Everything that decides the bits of the compressed weights."""
        chosen = {name: value for name, value in target.decides.items() if name != "evaluation"}
        return {
            **chosen,
            "batch_size": task.calibration.batch_size,
            "device": self.streamed.device.type,
            "torch": torch.__version__,
            **({"processes": size} if (size := task.calibration.world.size) > 1 else {}),
        }

    def score_compressed(
        self, compressed: Compressed, evaluation: PreparedEvaluation, *, label: str, progress: Progress, begun: Begun
    ) -> Scores:
        """The compressed model's scores; notes the peak of memory so far beside the predicted one."""
        assert self.workspace is not None
        streamed = StreamedModel.open(str(self.workspace.checkpoint.absolute()), device=str(self.streamed.device))
        scores = _score(streamed, evaluation, label=label, progress=progress, begun=begun)
        compressed.details["out_of_core"]["measured_peak_bytes"] = peak_memory_bytes()
        return scores

    def save(self, compressed: Compressed, target: Target, record: Mapping[str, Any]) -> None:
        """Nothing: it is complete in the workspace, where the next start of the same run finds it."""

    def finish(self, compressed: Compressed, target: Target, record: Mapping[str, Any]) -> None:
        """Seal the checkpoint, move it to the target and leave nothing beside it.

        Raises UserError when the place is taken, or it cannot be written.
        """
        assert self.workspace is not None and target.directory is not None
        write_card(compressed.model, self.workspace.checkpoint, record)
        publish(self.workspace.checkpoint, target.directory, run=target.run)
        self.workspace.remove()


def check_streams(method: Method | None, *, name: str, save_model: str | None, evaluation: EvaluationSpec) -> None:
    """Raises UserError unless a run of ``method`` can be done out of core."""
    if method is None or not method.streamed:
        raise UserError(
            f"method={name} needs the whole model in memory; "
            "out_of_core.enabled=true goes with method=modegpt, modegpt_plus, random or magnitude"
        )
    if whole := whole_model(method):
        raise UserError(f"{whole} needs the whole model in memory: leave it out with out_of_core.enabled=true")
    if save_model is None:
        raise UserError(
            "out of core the compressed model exists only on disk: say where with output.save_model=DIRECTORY (or auto)"
        )
    if evaluation.throughput.workloads:
        raise UserError(
            "speed is measured with the whole model in memory: "
            "out_of_core.enabled=true goes without evaluation.throughput"
        )
    if evaluation.zeroshot and evaluation.zeroshot.tasks:
        raise UserError(
            "zero-shot tasks need the whole model in memory: "
            "with out_of_core.enabled=true set evaluation.zeroshot.tasks=null"
        )


def _score(
    streamed: StreamedModel, evaluation: PreparedEvaluation, *, label: str, progress: Progress, begun: Begun
) -> Scores:
    windows = partial(streamed_perplexity, streamed)
    return evaluate(streamed.model, evaluation, label=label, progress=progress, score_windows=windows, begun=begun)
