"""What a run does out of core in place of its steps in memory."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modegpt.config import OutOfCoreConfig
from modegpt.cost.metering import peak_memory_bytes
from modegpt.errors import UserError
from modegpt.evaluation.evaluate import PreparedEvaluation, evaluate
from modegpt.evaluation.spec import EvaluationSpec
from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.methods.modegpt import MoDeGPT
from modegpt.models.card import model_card
from modegpt.models.checkpoints import publish
from modegpt.progress import Progress
from modegpt.streaming.compress import StreamedCompression
from modegpt.streaming.memory import Prediction, check_fits, gib, predict
from modegpt.streaming.model import StreamedModel
from modegpt.streaming.score import streamed_perplexity
from modegpt.streaming.workspace import Workspace


@dataclass
class OutOfCore:
    """A run's dense model on disk, the memory its compression was found to need, and where the checkpoint grows."""

    streamed: StreamedModel
    options: OutOfCoreConfig
    prediction: Prediction | None = None
    available: dict[str, int] | None = None
    workspace: Workspace | None = None

    def plan(self, method: Method, task: CompressionTask, evaluation: PreparedEvaluation) -> None:
        """Predict the peak of memory, say it, and refuse what does not fit, before any work. Raises UserError."""
        assert isinstance(method, MoDeGPT)
        on_disk, progress = self.options.hidden_states == "disk", task.calibration.progress
        self.prediction = predict(method, task, self.streamed, evaluation, on_disk=on_disk)
        limit = self.options.max_host_bytes
        self.available = check_fits(self.prediction, task, self.streamed, on_disk=on_disk, max_host_bytes=limit)
        for place, parts in self.prediction.record().items():
            spelled = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if name != "total")
            available = gib(self.available[place])
            progress.say(
                f"out of core: at most {gib(parts['total'])} of {place} memory expected ({spelled}); {available} are available"
            )

    def score(self, evaluation: PreparedEvaluation, *, label: str, progress: Progress) -> dict[str, dict]:
        """``evaluate`` of the dense model, layer by layer."""
        return _score(self.streamed, evaluation, label=label, progress=progress)

    def compress(
        self,
        method: Method,
        task: CompressionTask,
        *,
        destination: Path,
        decides: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
    ) -> Compressed:
        """Compress into a workspace beside ``destination``, going on where an earlier process of the same run was stopped."""
        assert isinstance(method, MoDeGPT)
        chosen = {name: value for name, value in decides.items() if name != "evaluation"}
        settings = {
            **chosen,
            "batch_size": task.calibration.batch_size,
            "device": self.streamed.device.type,
            "torch": torch.__version__,
        }
        key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        self.workspace, progress = Workspace(destination, key, settings), task.calibration.progress
        for other in self.workspace.others():
            progress.say(
                f"{other} is left of a run with other settings; it is not used (remove it if that run is not wanted)"
            )
        job = StreamedCompression(
            method, task, self.streamed, self.workspace, on_disk=self.options.hidden_states == "disk"
        )
        if (position := self.workspace.position()) is not None and position.next_layer:
            progress.say(
                f"going on from layer {position.next_layer} of {job.task.calibration.num_layers}, left in {self.workspace.directory}"
            )
        compressed, found = job.run()
        with task.calibration.meter.stage("saving"):
            job.complete(compressed.model, tokenizer)
        compressed.details["out_of_core"] = {
            "hidden_states": self.options.hidden_states,
            "predicted_peak_bytes": self.prediction and self.prediction.record(),
            "available_bytes": self.available,
            "layers_found_finished": found,
        }
        return compressed

    def score_compressed(self, evaluation: PreparedEvaluation, *, progress: Progress) -> dict[str, dict]:
        """``evaluate`` of the compressed model, layer by layer."""
        assert self.workspace is not None
        streamed = StreamedModel.open(str(self.workspace.checkpoint.absolute()), device=str(self.streamed.device))
        return _score(streamed, evaluation, label="compressed", progress=progress)

    def measured(self, compressed: Compressed) -> None:
        """Note the peak of memory so far beside the predicted one."""
        compressed.details["out_of_core"]["measured_peak_bytes"] = peak_memory_bytes()

    def publish(self, compressed: Compressed, destination: Path, record: Mapping[str, Any]) -> None:
        """Seal the checkpoint, move it to ``destination`` and leave nothing beside it. Raises UserError when the place is taken."""
        assert self.workspace is not None
        (self.workspace.checkpoint / "README.md").write_text(model_card(compressed.model, record), encoding="utf-8")
        publish(self.workspace.checkpoint, destination)
        self.workspace.remove()


def open_dense(path: str, *, dtype: str, device: str, options: OutOfCoreConfig) -> OutOfCore:
    """The dense model of a run out of core. Raises UserError for what cannot be streamed."""
    return OutOfCore(StreamedModel.open(path, dtype=dtype, device=device), options)


def check_streams(method: Method | None, *, name: str, save_model: str | None, evaluation: EvaluationSpec) -> None:
    """Raises UserError unless a run of ``method`` can be done out of core."""
    if type(method) is not MoDeGPT:
        raise UserError(
            f"method={name} needs the whole model in memory; out_of_core.enabled=true goes with method=modegpt, random or magnitude"
        )
    if save_model is None:
        raise UserError(
            "out of core the compressed model exists only on disk: say where with output.save_model=DIRECTORY (or auto)"
        )
    if evaluation.throughput.workloads:
        raise UserError(
            "speed is measured with the whole model in memory: out_of_core.enabled=true goes without evaluation.throughput"
        )
    if evaluation.zeroshot and evaluation.zeroshot.tasks:
        raise UserError(
            "zero-shot tasks need the whole model in memory: with out_of_core.enabled=true set evaluation.zeroshot.tasks=null"
        )


def _score(
    streamed: StreamedModel, evaluation: PreparedEvaluation, *, label: str, progress: Progress
) -> dict[str, dict]:
    return evaluate(
        streamed.model, evaluation, label=label, progress=progress, score_windows=partial(streamed_perplexity, streamed)
    )
