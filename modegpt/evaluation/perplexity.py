"""Perplexity by the field's protocol: one token stream, non-overlapping windows, the tail dropped."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modegpt.errors import UserError
from modegpt.evaluation.begun import Begun
from modegpt.evaluation.likelihood import input_device, token_log_likelihoods
from modegpt.progress import Progress

STANDARD_WINDOW = 2048  # most papers
LARGEST_AUTO_WINDOW = 4096  # the MoDeGPT paper's Llama-2 figures


def metric_name(source: str, window: int, *, bos: bool = False) -> str:
    """``ppl_<source>_<window>``: numbers on different windows must not share a name.

    ``bos``: each window has a BOS in front, which is not the field's usual; the name then says so.
    """
    return f"ppl_{source}_{window}{'_bos' if bos else ''}"


def resolve_windows(windows: str | Sequence[int], *, context: int, num_tokens: int, what: str) -> list[int]:
    """The window lengths to score, ascending.

    ``"auto"`` is the model's own context, 4096 at the most, and 2048 where the context holds that.

    Raises UserError when a window is longer than the model's context or than the text.
    """
    if isinstance(windows, str):
        assert windows == "auto", windows
        windows = [min(context, LARGEST_AUTO_WINDOW)] + [STANDARD_WINDOW] * (context >= STANDARD_WINDOW)
    for window in windows:
        if window > context:
            raise UserError(
                f"a perplexity window of {window} tokens is longer than the model's context of {context}; "
                f"set evaluation.perplexity.windows=[{context}]"
            )
        if window > num_tokens:
            raise UserError(
                f"{what} holds {num_tokens} tokens, less than one window of {window}; "
                f"give more text or set evaluation.perplexity.windows=[N] with N <= {num_tokens}"
            )
    return sorted(set(windows))


def token_fingerprint(token_ids: Tensor) -> str:
    """sha256 of the token ids as int64."""
    return hashlib.sha256(token_ids.to(torch.int64).cpu().contiguous().numpy().tobytes()).hexdigest()


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    token_ids: Tensor,
    *,
    window: int,
    batch_tokens: int,
    progress: Progress,
    begun: Begun | None = None,
) -> dict[str, float | int]:
    """``exp`` of the mean negative log-likelihood (nats) of the tokens of non-overlapping windows.

    Each window is scored on its own: its first token is given, the other ``window - 1`` are predicted. This is the
    protocol of the GPTQ, SparseGPT, Wanda and SliceGPT evaluations. Likelihoods in float32, their sum in float64.

    Args:
        token_ids: (num_tokens,) int64, the whole text tokenised once.
        batch_tokens: tokens in one forward pass; one window at least.
        begun: where the sum so far is kept, and goes on from.

    Raises UserError when logits are NaN or infinite.
    """
    num_windows = token_ids.numel() // window
    assert num_windows > 0, (token_ids.shape, window)
    batches = token_ids[: num_windows * window].view(num_windows, window).split(max(1, batch_tokens // window))
    begun, part = begun or Begun(), f"windows of {window}"
    (done, total), device = begun.parts.get(part, (0, 0.0)), input_device(model)
    with progress.bar(total=num_windows, description=f"perplexity, {part}", unit="window") as bar:
        bar.update(done)
        for batch in batches[done // len(batches[0]) :]:
            batch = batch.to(device)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
            scores = token_log_likelihoods(
                logits.flatten(0, 1), batch[:, 1:].flatten(), what=f"perplexity on windows of {window}"
            )
            total -= scores.double().sum().item()
            bar.update(len(batch))
            done += len(batch)
            begun.note(part, (done, total))
    num_predicted_tokens = num_windows * (window - 1)
    mean_nll = total / num_predicted_tokens
    if mean_nll > math.log(torch.finfo(torch.float64).max):
        raise UserError(f"the perplexity overflows: {mean_nll:.0f} nats a token on windows of {window}")
    return {
        "value": math.exp(mean_nll),
        "window": window,
        "num_windows": num_windows,
        "num_predicted_tokens": num_predicted_tokens,
        "mean_nll": mean_nll,
    }
