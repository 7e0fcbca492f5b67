"""From a token stream to calibration windows."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modegpt.data.texts import Documents, tokenize_stream
from modegpt.errors import UserError


@dataclass(frozen=True)
class CalibrationTokens:
    """Calibration windows.

    Args:
        ids: (num_samples, sequence_length) int64.
        sha256: of ``ids``.
        stream_tokens: tokens of the text that they were drawn from.
    """

    ids: Tensor
    sha256: str
    stream_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all windows."""
        return self.ids.numel()


def resolve_sequence_length(requested: int | str, context: int) -> int:
    """The calibration sequence length: ``"auto"`` is 2048, or the model's context where that is shorter.

    Raises UserError when an explicit length does not fit the context.
    """
    if requested == "auto":
        return min(2048, context)
    if int(requested) > context:
        raise UserError(
            f"calibration.sequence_length={requested} is longer than the model's context of {context} tokens; "
            f"use at most {context}, or auto"
        )
    return int(requested)


def draw_windows(
    stream: Tensor, *, num_samples: int, sequence_length: int, seed: int, asked_by: str = "calibration"
) -> CalibrationTokens:
    """Draw calibration windows from one token stream.

    The stream is cut into consecutive windows of ``sequence_length`` tokens (the tail is dropped) and
    ``num_samples`` of them are drawn without replacement, so no token is counted twice.

    Args:
        stream: (num_tokens,) int64 token ids of all documents, joined and tokenised once.
        seed: seeds a generator of its own; the global one is untouched.
        asked_by: the configuration group that wants them, for messages.

    Raises UserError when the stream holds fewer windows than asked for.
    """
    available = stream.numel() // sequence_length
    if available < num_samples:
        raise UserError(
            f"{asked_by} asks for {num_samples} x {sequence_length} = {num_samples * sequence_length} tokens but the "
            f"text holds {stream.numel()} ({available} whole windows); lower {asked_by}.num_samples to {available} or "
            f"{asked_by}.sequence_length, or give more text"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num_samples]
    ids = stream[: available * sequence_length].view(available, sequence_length)[order].contiguous()
    digest = hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()
    return CalibrationTokens(ids=ids, sha256=digest, stream_tokens=stream.numel())


def draw_tokens(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    vocab_size: int,
    num_samples: int,
    sequence_length: int | str,
    seed: int,
) -> CalibrationTokens:
    """Draw ``num_samples`` windows from ``documents`` for a model of this ``context`` and vocabulary.

    Args:
        sequence_length: tokens a window; ``"auto"`` is 2048, or the context where that is shorter.

    Raises UserError for too little text, a window longer than the context, and a tokenizer of another model.
    """
    length = resolve_sequence_length(sequence_length, context)
    stream = tokenize_stream(documents, tokenizer)
    if (largest := int(stream.max())) >= vocab_size:
        raise UserError(
            f"the tokenizer gives id {largest} but the model's vocabulary has {vocab_size} entries; "
            "they do not belong together"
        )
    return draw_windows(stream, num_samples=num_samples, sequence_length=length, seed=seed)
