"""Small things to save and load, shared by the checkpoint tests."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.models.family_table import SIZES, dense_model, sliced_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 .. w60 and three special tokens."""
    words = ["<pad>", "<s>", "</s>"] + [f"w{index}" for index in range(3, SIZES["vocab_size"])]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def compressed(name: str, dtype: str = "float32", **changes) -> PreTrainedModel:
    model = dense_model(name, **changes).to(DTYPES[dtype])
    return sliced_model(model)[0]


RECORD = {
    "name": "llama at 30 %",
    "command": "modegpt compression.sparsity=0.3",
    "model": {"name": "tiny", "path": "someone/tiny", "num_parameters": 1234, "weights_sha256": "abc"},
    "compression": {"method": "modegpt", "achieved_sparsity": 0.3012, "whole_model_sparsity": 0.21},
    "calibration": {"source": "tiny", "num_samples": 16, "sequence_length": 128, "seed": 0},
    "metrics": {
        "dense": {
            "perplexity": {"ppl_tiny_64": {"value": 3.5}},
            "zeroshot": {"facts": {"metric": "acc", "value": 0.75}, "mean": 0.75},
        },
        "compressed": {
            "perplexity": {"ppl_tiny_64": {"value": 4.25}},
            "zeroshot": {"facts": {"metric": "acc", "value": 0.7}, "mean": 0.7},
        },
    },
}
