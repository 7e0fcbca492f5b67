"""The five tiny tasks as lm-evaluation-harness configurations."""

from __future__ import annotations

from pathlib import Path

import yaml

from modegpt.tiny import DATA_DIR

TASKS_DIR = Path(__file__).parent / "tasks"
TINY_TASKS = ("tiny_facts_easy", "tiny_facts_hard", "tiny_physical", "tiny_pronoun", "tiny_story")


def task_configs() -> dict[str, dict]:
    """Task name to configuration, data files made absolute: ready for `simple_evaluate(tasks=[...])`."""
    configs = {}
    for name in TINY_TASKS:
        config = yaml.safe_load((TASKS_DIR / f"{name}.yaml").read_text())
        files = config["dataset_kwargs"]["data_files"]
        config["dataset_kwargs"]["data_files"] = {split: str(DATA_DIR / file) for split, file in files.items()}
        configs[name] = config
    return configs
