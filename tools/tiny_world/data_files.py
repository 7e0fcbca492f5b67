"""The committed data files: a training sample for calibration, validation and test text, and the items of the tasks."""

import json
from pathlib import Path

from modegpt.data.embedded import DATA_DIR
from tools.tiny_world import corpus

NUM_CALIBRATION_DOCUMENTS = 4000


def data_files() -> dict[str, str]:
    """File name to content, exactly as committed."""
    texts = {
        "train": corpus.documents("train", num_documents=NUM_CALIBRATION_DOCUMENTS),
        "validation": corpus.documents("validation"),
        "test": corpus.documents("test"),
    }
    files = {f"{split}.jsonl": [{"text": text} for text in documents] for split, documents in texts.items()}
    files |= {f"{task}.jsonl": corpus.task_items(task) for task in corpus.NUM_ITEMS}
    return {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in files.items()}


def write_data(directory: Path = DATA_DIR) -> None:
    """Write every data file into the directory, creating it if needed."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in data_files().items():
        (directory / name).write_text(content, newline="\n")
