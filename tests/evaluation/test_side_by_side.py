"""Continuations of one context stand side by side behind it: the numbers of one pass each, with fewer tokens."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.evaluation.begun import Begun
from modegpt.evaluation.isolation import isolated_harness
from modegpt.models import modeling_modegpt, modeling_sliced
from tests.models.family_table import CONFIGS, GROUPED, native_model

Request = tuple[None, list[int], list[int]]

UNEQUAL = {
    "qk_head_dims": [4, 6, 8],
    "v_head_dims": [8, 3, 5],
    "kv_head_counts": [2, 1, 0],
    "intermediate_sizes": [40, 11, 0],
    "linear_ranks": [{"self_attn.q_proj": 3, "mlp.up_proj": 5}, {}, {}],
}


def random_model(name: str) -> PreTrainedModel:
    """A family's own, or ``compressed``: sizes that differ from layer to layer, and maps of low rank, or ``sliced``."""
    torch.manual_seed(3)
    if name == "compressed":
        return spread(
            modeling_modegpt.MoDeGPTLlamaForCausalLM(modeling_modegpt.MoDeGPTLlamaConfig(**GROUPED, **UNEQUAL))
        )
    if name == "sliced":
        fields = CONFIGS["opt"].to_dict() | {"tie_word_embeddings": False}
        config = modeling_sliced.SlicedOPTConfig(**fields, stream_sizes=[24, 20, 32, 17, 24, 20, 9])
        return spread(modeling_sliced.SlicedOPTForCausalLM(config))
    return native_model(name)


def spread(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def requests(*lengths: tuple[int, Sequence[int]]) -> list[Request]:
    """For each context length, a random context with a random continuation of each length."""
    generator = torch.Generator().manual_seed(5)

    def draw(count: int) -> list[int]:
        return torch.randint(3, 61, (count,), generator=generator).tolist()

    return [
        (None, context, draw(count)) for length, counts in lengths for context in [draw(length)] for count in counts
    ]


class Seen:
    """The tokens and rows that a model is called with, and a bar that counts."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.total, self.n = 0, 0
        self.shapes: list[tuple[int, ...]] = []
        model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, _: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if not args:
            self.shapes.append(tuple(kwargs["input_ids"].shape))

    def update(self, count: int) -> None:
        self.n += count


def scorer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bar: Any, **changes: Any) -> Any:
    with isolated_harness():
        from modegpt.evaluation.harness_model import HarnessModel

        options = {"batch_size": 8, "max_length": 64, "encodings": {}, "bar": bar, "begun": Begun()} | changes
        return HarnessModel(model, copy.deepcopy(tokenizer), **options)


def assert_equal_to_one_by_one(model: PreTrainedModel, asked: list[Request], got: list[tuple[float, bool]]) -> None:
    with torch.inference_mode():
        for (_, context, continuation), (value, greedy) in zip(asked, got, strict=True):
            logits = model(torch.tensor([[*context, *continuation][:-1]])).logits[0, -len(continuation) :]
            scores = logits.log_softmax(-1)[range(len(continuation)), continuation]
            assert value == pytest.approx(scores.sum().item(), rel=1e-5, abs=1e-4)
            assert greedy == (logits.argmax(-1).tolist() == continuation)


ITEMS = ((9, (4, 1, 3, 1)), (2, (3, 2)), (1, (2, 2)), (8, (4, 4, 2)), (3, (5,)), (20, (6, 1, 9)))
SHORT = ((3, (2, 3, 4)), (4, (2, 3)))
"""Inputs of up to 6 tokens: what the windows of the tiny models hold."""
KINDS = ("llama", "opt", "gemma3_text", "mistral-window", "qwen2-windows", "mixtral", "smollm3", "compressed", "sliced")


@pytest.mark.parametrize("name", KINDS)
def test_scores_are_those_of_one_pass_each(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model, asked = random_model(name), requests(*ITEMS, *SHORT)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        seen = Seen(model)
        got = scorer(model, tokenizer, seen)._loglikelihood_tokens(asked)
        assert seen.total == seen.n < sum(len(context) + len(rest) - 1 for _, context, rest in asked)
        assert_equal_to_one_by_one(model, asked, got)


def shapes(asked: list[Request], tokenizer: PreTrainedTokenizerBase, name: str = "llama", **changes: Any) -> list:
    """What the model is called with, in order."""
    model = changes.pop("model", None) or random_model(name)
    seen = Seen(model)
    got = scorer(model, tokenizer, seen, **changes)._loglikelihood_tokens(asked)
    assert_equal_to_one_by_one(model, asked, got)
    return seen.shapes


def test_a_context_is_read_once(tokenizer: PreTrainedTokenizerBase) -> None:
    asked = requests((9, (4, 1, 3)))
    assert shapes(asked, tokenizer) == [(1, 8 + 4 + 1 + 3)]  # the last token of the context is one of each
    assert shapes(asked, tokenizer, batch_size=2) == [(1, 8 + 4 + 1), (1, 11)]
    assert shapes(asked, tokenizer, batch_size=1) == [(1, 12), (1, 11), (1, 9)]
    assert shapes(asked, tokenizer, max_length=14) == [(1, 8 + 4 + 1), (1, 11)]
    assert shapes(requests((9, (4, 3)), (8, (4, 3)), (7, (2,))), tokenizer) == [(2, 15), (1, 8)]
    assert shapes(requests((1, (4, 3))), tokenizer) == [(2, 4)]  # nothing in common


def test_a_window_holds_what_stands_side_by_side(tokenizer: PreTrainedTokenizerBase) -> None:
    asked = requests((3, (2, 4)), (4, (4, 2)))  # the third is longer than the window
    assert shapes(asked, tokenizer, "mistral-window") == [(1, 2 + 2 + 4), (2, 7)]
    assert shapes(asked, tokenizer, "mistral-no-window") == [(2, 3 + 4 + 2)]


def test_what_may_not_take_a_mask_is_scored_one_by_one(tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2, n_positions=64)).eval()
    assert shapes(requests((9, (4, 1))), tokenizer, model=other) == [(2, 12)]
    model = random_model("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    assert scorer(model, tokenizer, Seen(model)).longest_beside == 0


def test_answers_that_an_older_start_kept_are_not_misread(tokenizer: PreTrainedTokenizerBase) -> None:
    model, asked = random_model("llama"), requests(*ITEMS)
    begun = Begun()
    begun.parts["answers 1"] = [(-1.0, True)] * 3  # in another order
    got = scorer(model, tokenizer, Seen(model), begun=begun)._loglikelihood_tokens(asked)
    assert_equal_to_one_by_one(model, asked, got)
