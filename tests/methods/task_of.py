"""A compression task on random tokens, for any tiny model."""

import torch
from transformers import PreTrainedModel

from modegpt.calibration.calibration import Calibration
from modegpt.data.tokens import draw_windows
from modegpt.methods.base import CompressionTask
from modegpt.progress import Progress


def task_of(
    model: PreTrainedModel, sparsity: float, *, num_samples: int = 8, sequence_length: int = 20
) -> CompressionTask:
    """``num_samples`` random windows in batches of 3, so that the last batch is smaller; all is drawn from seed 0."""
    stream = torch.randint(
        3, model.config.vocab_size, (num_samples * sequence_length,), generator=torch.Generator().manual_seed(0)
    )
    tokens = draw_windows(stream, num_samples=num_samples, sequence_length=sequence_length, seed=0)
    return CompressionTask(Calibration(model, tokens, batch_size=3, progress=Progress(quiet=True)), sparsity)
