"""A saved random model of each family, and its compression in memory and out of core."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from modegpt.calibration.calibration import Calibration
from modegpt.calibration.world import ALONE, World
from modegpt.data.tokens import CalibrationTokens, draw_windows
from modegpt.methods.base import Compressed, CompressionTask, LayerByLayer
from modegpt.progress import Progress
from modegpt.streaming.compress import StreamedCompression
from modegpt.streaming.model import StreamedModel
from modegpt.streaming.workspace import Workspace
from tests.models.family_table import native_model
from tests.models.saved import tiny_tokenizer


def save_dense(name: str, directory: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "20KB") -> Path:
    """A tiny dense model of family ``name`` in many shards."""
    model = native_model(name).to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tokens_of(model: PreTrainedModel) -> CalibrationTokens:
    stream = torch.randint(3, model.config.vocab_size, (8 * 20,), generator=torch.Generator().manual_seed(0))
    return draw_windows(stream, num_samples=8, sequence_length=20, seed=0)


def task_on(model: PreTrainedModel, sparsity: float = 0.3) -> CompressionTask:
    """Batches of 3, so that the last is smaller."""
    return CompressionTask(Calibration(model, tokens_of(model), batch_size=3, progress=Progress(quiet=True)), sparsity)


def compress_out_of_core(
    method: LayerByLayer, dense: Path, destination: Path, *, on_disk: bool = False, world: World = ALONE
) -> tuple[Compressed, Path, int]:
    """Compress the checkpoint in ``dense``; returns the result, its checkpoint, and the layers found finished."""
    streamed = StreamedModel.open(str(dense))
    workspace = Workspace(destination, "0" * 12, {}, world)
    task = task_on(streamed.model)
    task = replace(task, calibration=replace(task.calibration, world=world))
    job = StreamedCompression(method, task, streamed, workspace, on_disk=on_disk)
    compressed, found = job.run()
    if world.leads:
        job.complete(compressed, AutoTokenizer.from_pretrained(dense))
    return compressed, workspace.checkpoint, found
