"""What our own logits say to prompts, which engines must say too."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14], [3, 4]]


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: Sequence[int], num_new: int, banned: Sequence[int] = ()) -> dict[str, list]:
    """The likeliest token but the ``banned`` at each of ``num_new`` steps, and its log-probability, without a cache."""
    ids, tokens, logprobs = list(prompt), [], []
    for _ in range(num_new):
        scores = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        tokens.append(int(scores.index_fill(0, torch.tensor(banned, dtype=torch.long), float("-inf")).argmax()))
        logprobs.append(float(scores[tokens[-1]]))
        ids.append(tokens[-1])
    return {"tokens": tokens, "logprobs": logprobs}


def assert_same(answers: Any, expected: list[dict[str, list]], *, tolerance: float = 1e-4) -> None:
    assert isinstance(answers, list), answers["error"]
    assert [answer["tokens"] for answer in answers] == [each["tokens"] for each in expected]
    for answer, each in zip(answers, expected, strict=True):
        assert answer["logprobs"] == pytest.approx(each["logprobs"], abs=tolerance)
