"""What a compressed model carries beside its weights: files that appear whenever it is saved or pushed."""

import json
from functools import wraps
from pathlib import Path
from typing import Any

from modegpt.models.card import model_card

REPORT = "modegpt_report.json"


def carries_report(cls: Any) -> None:
    """Give the model class ``cls`` a ``modegpt_report``, which its ``save_pretrained`` and ``push_to_hub`` write.

    A model whose ``modegpt_report`` is not None is saved with its model card (``README.md``), the report
    (``modegpt_report.json``) and ``modegpt_files``, which maps a file name to a function that writes it to a path.
    """
    save, upload = cls.save_pretrained, cls._upload_modified_files

    @wraps(save)
    def save_pretrained(
        self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        save(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            _write_report(self, Path(save_directory))

    @wraps(upload)
    def upload_modified_files(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        _write_report(self, Path(working_dir))  # again: push_to_hub puts a card of its own there
        return upload(self, working_dir, *args, **kwargs)

    cls.modegpt_report, cls.modegpt_files = None, {}
    cls.save_pretrained, cls._upload_modified_files = save_pretrained, upload_modified_files


def _write_report(model: Any, directory: Path) -> None:
    if model.modegpt_report is None:
        return
    (directory / "README.md").write_text(model_card(model, model.modegpt_report), encoding="utf-8")
    report = json.dumps(model.modegpt_report, indent=1, ensure_ascii=False)
    (directory / REPORT).write_text(report + "\n", encoding="utf-8")
    for name, write in model.modegpt_files.items():
        write(directory / name)
