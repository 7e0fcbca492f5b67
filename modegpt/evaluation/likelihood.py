"""Log-likelihoods of tokens from logits, in float32, without a float32 copy of all logits."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from modegpt.errors import UserError

CHUNK_ELEMENTS = 2**24  # 64 MiB of float32 logits at a time


def token_log_likelihoods(logits: Tensor, targets: Tensor, *, what: str) -> Tensor:
    """``log softmax(logits)[target]`` for every row.

    Args:
        logits: (num_tokens, vocabulary), any float dtype; upcast to float32 in chunks of rows.
        targets: (num_tokens,) int64.
        what: names the place for the error.

    Returns (num_tokens,) float32. Raises UserError when one of them is NaN or infinite.
    """
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    chunks = zip(logits.split(rows), targets.split(rows), strict=True)
    scores = torch.cat([-F.cross_entropy(chunk.float(), target, reduction="none") for chunk, target in chunks])
    if not torch.isfinite(scores).all():
        raise UserError(
            f"the model's logits are NaN or infinite while scoring {what}; look at its weights, "
            f"or try another dtype than {logits.dtype}"
        )
    return scores


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a batch for ``model`` is put: on its device.

    In memory where a device map keeps the first weights off the devices: it then moves inputs itself.
    """
    return torch.device("cpu") if model.device.type == "meta" else model.device
