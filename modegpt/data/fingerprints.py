"""What identifies a tokenizer."""

import hashlib
import json

from transformers import PreTrainedTokenizerBase


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what turns text into ids: the tokenizer's model, rules and special tokens.

    Its padding and truncation are left out, which callers set and unset.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = tokenizer.get_vocab()
    else:
        rules = {
            key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")
        }
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([rules, special], sort_keys=True, ensure_ascii=False).encode()).hexdigest()
