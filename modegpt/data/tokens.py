"""From a token stream to calibration windows."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modegpt.data.texts import Documents, tokenize_stream
from modegpt.errors import UserError

BOS_IN_EACH_WINDOW = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"})
"""Families trained with a BOS before whatever they see: on WikiText-2 Gemma 3 270M has 3.37 nats with it, 4.13 without.

For all others the field's custom holds: one stream, whose windows begin anywhere.
"""


def window_bos(habit: str, *, family: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token in front of every window; None where windows are cut from the stream as it is.

    Args:
        habit: of ``config.BOS_HABITS``; ``"auto"`` is what the ``family`` (a Transformers model type) was trained with.

    Raises UserError where the tokenizer has no BOS token to put there.
    """
    if habit == "stream_start" or (habit == "auto" and family not in BOS_IN_EACH_WINDOW):
        return None
    if tokenizer.bos_token_id is None:
        raise UserError("a BOS in front of each window needs one, which the tokenizer has not; set bos=stream_start")
    return int(tokenizer.bos_token_id)


def token_stream(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, bos: int | None
) -> Tensor:
    """The stream that windows with this ``bos`` in front, or without, are cut from.

    Raises UserError for a tokenizer with ids that the model has no embedding for.
    """
    stream = tokenize_stream(documents, tokenizer, special_tokens=bos is None)
    largest = max(int(stream.max()) if stream.numel() else 0, bos or 0)
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer gives id {largest} but the model's vocabulary has {vocab_size} entries; "
            "they do not belong together"
        )
    return stream


def cut_windows(stream: Tensor, length: int, *, bos: int | None) -> Tensor:
    """All consecutive windows of ``length`` tokens, the tail dropped; ``bos`` is the first token of each, if given.

    Returns (num_windows, length) int64.
    """
    taken = length if bos is None else length - 1
    count = stream.numel() // taken
    windows = stream[: count * taken].view(count, taken)
    return windows if bos is None else torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)


@dataclass(frozen=True)
class CalibrationTokens:
    """Calibration windows.

    Args:
        ids: (num_samples, sequence_length) int64.
        sha256: of ``ids``.
        stream_tokens: tokens of the text that they were drawn from.
        bos: the token in front of each of them, where there is one.
    """

    ids: Tensor
    sha256: str
    stream_tokens: int
    bos: int | None = None

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
    stream: Tensor,
    *,
    num_samples: int,
    sequence_length: int,
    seed: int,
    bos: int | None = None,
    asked_by: str = "calibration",
) -> CalibrationTokens:
    """Draw calibration windows from one token stream.

    The stream is cut into consecutive windows of ``sequence_length`` tokens (see ``cut_windows``) and
    ``num_samples`` of them are drawn without replacement, so no token is counted twice.

    Args:
        stream: (num_tokens,) int64 token ids of all documents, joined and tokenised once.
        seed: seeds a generator of its own; the global one is untouched.
        bos: the token in front of each window; None: windows are cut from the stream as it is.
        asked_by: the configuration group that wants them, for messages.

    Raises UserError when the stream holds fewer windows than asked for.
    """
    windows = cut_windows(stream, sequence_length, bos=bos)
    available = len(windows)
    if available < num_samples:
        raise UserError(
            f"{asked_by} asks for {num_samples} x {sequence_length} = {num_samples * sequence_length} tokens but the "
            f"text holds {stream.numel()} ({available} whole windows); lower {asked_by}.num_samples to {available} or "
            f"{asked_by}.sequence_length, or give more text"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num_samples]
    ids = windows[order].contiguous()
    digest = hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()
    return CalibrationTokens(ids=ids, sha256=digest, stream_tokens=stream.numel(), bos=bos)


def draw_tokens(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    vocab_size: int,
    num_samples: int,
    sequence_length: int | str,
    seed: int,
    bos: int | None = None,
) -> CalibrationTokens:
    """Draw ``num_samples`` windows from ``documents`` for a model of this ``context`` and vocabulary.

    Args:
        sequence_length: tokens a window; ``"auto"`` is 2048, or the context where that is shorter.
        bos: see ``draw_windows``.

    Raises UserError for too little text, a window longer than the context, and a tokenizer of another model.
    """
    length = resolve_sequence_length(sequence_length, context)
    stream = token_stream(documents, tokenizer, vocab_size=vocab_size, bos=bos)
    return draw_windows(stream, num_samples=num_samples, sequence_length=length, seed=seed, bos=bos)
