"""The shipped models load, are as small and as good as they claim, and match their tokenizer and their record."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modegpt.data.embedded import TINY_MODELS
from tools.tiny_world import corpus
from tools.tiny_world.train import ARCHITECTURES, CONTEXT_TOKENS, encode_documents, task_accuracies, window_perplexity


@pytest.fixture(scope="module", params=sorted(TINY_MODELS))
def loaded(request):
    path = TINY_MODELS[request.param]
    return request.param, AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def test_files_are_small_and_float32(loaded):
    name, model, _ = loaded
    largest = {"tiny-olmoe": 2e6, "tiny-qwen3": 3e6}.get(name, 6.5e6)
    assert sum(file.stat().st_size for file in TINY_MODELS[name].iterdir()) < largest
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_architecture_is_the_recipe_s(loaded):
    name, model, tokenizer = loaded
    for key, value in ARCHITECTURES[name].items():
        assert getattr(model.config, key) == value
    assert len(tokenizer) == model.config.vocab_size
    assert (tokenizer("a").input_ids[0] == tokenizer.bos_token_id) == (name == "tiny-llama")


def test_recorded_test_perplexity_is_reproduced(loaded):
    name, model, tokenizer = loaded
    record = json.loads((TINY_MODELS[name] / "RECIPE.json").read_text())
    assert record["num_parameters"] == model.num_parameters()
    ids, _ = encode_documents(corpus.documents("test"), tokenizer)
    assert len(ids) >= 40 * CONTEXT_TOKENS
    assert window_perplexity(model, ids, window=CONTEXT_TOKENS) == pytest.approx(
        record["perplexity_256"]["test"], rel=1e-3
    )


def test_accuracy_is_far_above_chance(loaded):
    name, model, tokenizer = loaded
    record = json.loads((TINY_MODELS[name] / "RECIPE.json").read_text())
    assert record["mean_accuracy"] >= 0.75
    accuracies = task_accuracies(model, tokenizer, limit=24)
    assert sum(row["acc"] for row in accuracies.values()) / 5 >= 0.75
