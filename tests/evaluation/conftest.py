"""A random model, a character tokenizer, and task files of a few items."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.evaluation.task_rows import ROWS

CHARACTERS = ["<s>", "</s>", "<unk>", *map(chr, range(10, 11)), *map(chr, range(32, 127))]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, BOS first."""
    vocabulary = {character: index for index, character in enumerate(CHARACTERS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    """A random model of context 64, its logits far enough from flat that scores differ."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """``ROWS`` as files, PIQA's labels beside it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task, rows in ROWS.items():
        (folder / f"{task}_some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "piqa_some-labels.lst").write_text("0\n1\n")
    return folder
