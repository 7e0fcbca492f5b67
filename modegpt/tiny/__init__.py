"""The embedded world: two trained tiny models, the corpus they learned from, and five multiple-choice tasks."""

from __future__ import annotations

from pathlib import Path

MODELS_DIR = Path(__file__).parent / "models"
DATA_DIR = Path(__file__).parent / "data"
TINY_MODELS = {name: MODELS_DIR / name for name in ("tiny-llama", "tiny-opt")}
TEXT_SPLITS = ("train", "validation", "test")


def model_path(name: str) -> Path:
    """Directory of an embedded model in Hugging Face form; KeyError for a name not in `TINY_MODELS`."""
    return TINY_MODELS[name]


def text_path(split: str) -> Path:
    """The jsonl file (field `text`, one document a line) of `train` (a sample), `validation` or `test`."""
    if split not in TEXT_SPLITS:
        raise KeyError(f"unknown split {split!r}: one of {', '.join(TEXT_SPLITS)}")
    return DATA_DIR / f"{split}.jsonl"
