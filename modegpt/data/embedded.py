"""The embedded world: four trained tiny models, the corpus they learned from, and five multiple-choice tasks.

``tools/tiny_world`` makes all of it again.
"""

from pathlib import Path

import yaml

TINY = Path(__file__).parent / "tiny"
MODELS_DIR, DATA_DIR, TASKS_DIR = TINY / "models", TINY / "texts", TINY / "tasks"
TINY_MODELS = {name: MODELS_DIR / name for name in ("tiny-llama", "tiny-olmoe", "tiny-opt", "tiny-qwen3")}
"""The directory of each embedded model, in Hugging Face form."""
TEXT_SPLITS = ("train", "validation", "test")
TINY_TASKS = ("tiny_facts_easy", "tiny_facts_hard", "tiny_physical", "tiny_pronoun", "tiny_story")


def text_path(split: str) -> Path:
    """The jsonl file (field ``text``, one document a line) of ``train`` (a sample), ``validation`` or ``test``."""
    if split not in TEXT_SPLITS:
        raise KeyError(f"unknown split {split!r}: one of {', '.join(TEXT_SPLITS)}")
    return DATA_DIR / f"{split}.jsonl"


def task_configs() -> dict[str, dict]:
    """Task name to its configuration for lm-evaluation-harness, with data files made absolute."""
    configs = {}
    for name in TINY_TASKS:
        config = yaml.safe_load((TASKS_DIR / f"{name}.yaml").read_text())
        files = config["dataset_kwargs"]["data_files"]
        config["dataset_kwargs"]["data_files"] = {split: str(DATA_DIR / file) for split, file in files.items()}
        configs[name] = config
    return configs
