"""llama.cpp runs a GGUF file of a compressed model: the same tokens, the same log-probabilities, its own tokenizer."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.models import dense_shape, family_of
from modegpt.models.checkpoints import load_model, load_tokenizer
from modegpt.models.deci import FAMILIES as DECI
from modegpt.models.gguf_file import OWN, write_gguf
from tests.engines.forms import FORMS
from tests.engines.greedy import PROMPTS, assert_same, greedy
from tests.models.family_table import CONFIGS, sliced_model

pytestmark = [pytest.mark.engines, pytest.mark.slow]

FAMILY = {name: family_of(config) for name, config in CONFIGS.items()}
NAMES = [
    name
    for name in FORMS
    if name not in FAMILY or (FAMILY[name].model_type in DECI + OWN and "window" not in name.replace("no-window", ""))
]
"""llama.cpp's architecture of free widths has no sliding window."""
ROUGH = {"gemma": 1e-3}
"""llama.cpp reads the GELU from a table of f16."""
TEXTS = ["Once upon a time, there was a little girl named Lily.", "The cat sat on 12 mats!"]


def unprintable(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that are no text by themselves, which llama.cpp's server leaves out of its answers."""
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))], skip_special_tokens=True)
    return [index for index, text in enumerate(texts) if not text or "\ufffd" in text]


def job(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, prompts: list, num_new: int, **options):
    """Write the file; returns what to ask llama.cpp, and what our logits say."""
    write_gguf(model, tokenizer, path, **options)
    banned = unprintable(tokenizer)
    ids = [tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt for prompt in prompts]
    expected = [greedy(model, prompt, num_new, banned) for prompt in ids]
    return {"path": str(path), "prompts": prompts, "num_new": num_new, "banned": banned}, expected


@pytest.fixture(scope="module")
def answers(ask: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, list]]:
    """By form: what llama.cpp said and what our logits say."""
    root, tokenizer, jobs, expected = tmp_path_factory.mktemp("gguf"), load_tokenizer("embedded:tiny-llama"), [], []
    for index, name in enumerate(NAMES):
        make, given = FORMS[name]
        arguments = dict(given)
        if name in FAMILY and FAMILY[name].head_norms:  # which no family has a form for where heads lost dims
            arguments["query_key"] = False
        asked, wanted = job(make(**arguments), tokenizer, root / f"{index}.gguf", PROMPTS, 8, kind="f32")
        jobs.append(asked)
        expected.append(wanted)
    return dict(zip(NAMES, zip(ask("llama_cpp_greedy.py", jobs), expected, strict=True), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_tokens_and_probabilities(answers: dict, name: str) -> None:
    assert_same(*answers[name], tolerance=ROUGH.get(name, 1e-4))


def trained(source: str) -> PreTrainedModel:
    return sliced_model(load_model(source, device="cpu"))[0]


def test_its_tokenizer_reads_text_as_ours_does(ask: Callable, tmp_path: Path, shared_dir: Path) -> None:
    """Byte-level words, and SentencePiece's."""
    jobs, expected = [], []
    for index, source in enumerate(("embedded:tiny-llama", str(shared_dir / "models" / "stories260K"))):
        asked, wanted = job(trained(source), load_tokenizer(source), tmp_path / f"{index}.gguf", TEXTS, 4, kind="f32")
        jobs.append(asked)
        expected.append(wanted)
    for found, wanted in zip(ask("llama_cpp_greedy.py", jobs), expected, strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.01), ("q8_0", 0.1), ("q4_0", 0.5), ("q4_k", 0.5)])
def test_quantised_weights_say_nearly_the_same(ask: Callable, tmp_path: Path, kind: str, tolerance: float) -> None:
    """On the embedded model with all its sizes but the MLP's, so that its answers are sure ones."""
    model = load_model("embedded:tiny-llama", device="cpu")
    model = sliced_model(model, dataclasses.replace(dense_shape(model.config), intermediate_size=288))[0]
    asked, expected = job(
        model, load_tokenizer("embedded:tiny-llama"), tmp_path / "model.gguf", TEXTS[:1], 1, kind=kind
    )
    (found,) = ask("llama_cpp_greedy.py", [asked])
    assert_same(found, expected, tolerance=tolerance)
