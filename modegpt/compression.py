"""What a method is given: calibration tokens drawn from text, and a task that was checked before any expensive work."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.calibration.cache import StatisticsCache
from modegpt.calibration.calibration import Calibration
from modegpt.calibration.world import World
from modegpt.cost.metering import CostMeter
from modegpt.data.texts import Documents, tokenize_stream
from modegpt.data.tokens import CalibrationTokens, draw_windows, resolve_sequence_length
from modegpt.errors import UserError
from modegpt.methods.base import CompressionTask, Method
from modegpt.models import family_of, is_compressed
from modegpt.progress import Progress


def draw_tokens(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    *,
    num_samples: int,
    sequence_length: int | str,
    seed: int,
) -> CalibrationTokens:
    """Draw ``num_samples`` windows from ``documents``; ``sequence_length`` ``"auto"``: 2048 or the model's context.

    Raises UserError for too little text, a window longer than the context, and a tokenizer of another model.
    """
    length = resolve_sequence_length(sequence_length, int(model.config.max_position_embeddings))
    stream = tokenize_stream(documents, tokenizer)
    if (largest := int(stream.max())) >= model.config.vocab_size:
        raise UserError(
            f"the tokenizer gives id {largest} but the model's vocabulary has {model.config.vocab_size} entries; "
            "they do not belong together"
        )
    return draw_windows(stream, num_samples=num_samples, sequence_length=length, seed=seed)


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
