"""Local files of tasks: of the standard ones, converted on load to the columns lm-evaluation-harness expects.

A row may already have the task's own columns, as on the hub; it then passes unchanged. Otherwise it has the form in
which these sets are also passed around: ``question, choices, gold`` (ARC), ``query, choices, gold`` (OpenBookQA),
``context_options, continuation, gold`` (WinoGrande), and PIQA with its labels in a file of their own.

Any other task is a folder of its name with a file for each split of its data set, rows as on the hub:
``gsm8k/test.jsonl`` and ``gsm8k/train.jsonl``, ``mmlu_anatomy/test.jsonl`` and ``mmlu_anatomy/dev.jsonl``.
"""

import os
from collections.abc import Callable
from pathlib import Path

from modegpt.data.texts import field, only_file, read_rows, read_text
from modegpt.errors import UserError


def local_rows(task: str, folder: str | Path) -> list[dict]:
    """Rows of ``task`` from the one file ``<folder>/<task>*.jsonl`` (or ``.json``), in the task's own columns.

    Raises UserError when the folder or the file is missing, or a row does not have the form (the line is named).
    """
    if not os.path.isdir(folder):
        raise UserError(f"evaluation.zeroshot.data_path={folder} is not a folder; it should hold {task}*.jsonl")
    if task not in CONVERTERS:
        raise UserError(
            f"task {task!r} is not read from local files: evaluation.zeroshot.data_path serves "
            f"{', '.join(CONVERTERS)}, and any task with a folder of its name: {Path(folder) / task / 'SPLIT.jsonl'}"
        )
    path = only_file(folder, f"{task}*.json*")
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path} has no rows")
    labels = iter(_piqa_labels(path, rows) if task == "piqa" else ())
    return [CONVERTERS[task](row | {"label": next(labels)} if task == "piqa" else row, place) for place, row in rows]


def in_folders(name: str, folder: str | Path) -> bool:
    """Whether the rows of the task or group ``name`` are in folders below ``folder``, not in a file in it."""
    below = (path for path in Path(folder).glob("*") if path.is_dir())
    return any(name not in CONVERTERS or path.name == name for path in below)


def local_splits(task: str, folder: str | Path, *, scored: str) -> dict[str, list[dict]]:
    """Rows by split of the files ``<folder>/<task>/<split>.jsonl`` (or ``.json``).

    Raises UserError without rows of the split that is ``scored``.
    """
    files = sorted((Path(folder) / task).glob("*.json*"))
    rows = {file.name.split(".")[0]: [row for _, row in read_rows(file)] for file in files}
    if not rows.get(scored):
        raise UserError(f"task {task!r} is scored on {Path(folder) / task / scored}.jsonl, which is missing or empty")
    return rows


def _piqa_labels(path: Path, rows: list[tuple[str, dict]]) -> list[int]:
    if all("label" in row for _, row in rows):
        return [row["label"] for _, row in rows]
    labels_path = path.with_name(path.name.split(".")[0] + "-labels.lst")
    labels = read_text(labels_path).split()
    if len(labels) != len(rows) or not set(labels) <= {"0", "1"}:
        raise UserError(
            f"{labels_path} should hold one label, 0 or 1, for each of the {len(rows)} rows of {path}; "
            f"it holds {len(labels)}"
        )
    return [int(label) for label in labels]


def _piqa(row: dict, place: str) -> dict:
    if row["label"] not in (0, 1):
        raise UserError(f"{place}: label is {row['label']!r}, not 0 or 1")
    return {name: field(row, name, place) for name in ("goal", "sol1", "sol2")} | {"label": row["label"]}


def _hellaswag(row: dict, place: str) -> dict:
    texts = {name: field(row, name, place) for name in ("activity_label", "ctx_a", "ctx_b")}
    endings = field(row, "endings", place, list)
    label = str(field(row, "label", place, int, str))
    if label not in map(str, range(len(endings))):
        raise UserError(f"{place}: label {label} is not the index of one of {len(endings)} endings")
    return texts | {"endings": endings, "label": label}


def _winogrande(row: dict, place: str) -> dict:
    """The hub's columns, ``sentence`` with its gap ``_`` among them.

    The rows passed around hold the strings scored: what stands before the gap followed by each option, and the rest.
    The cut is the last word boundary that the two contexts share, so options are whole words.
    """
    if "sentence" in row:
        return {name: field(row, name, place) for name in ("sentence", "option1", "option2", "answer")}
    first, second = _choices(row, "context_options", place, 2)
    shared = os.path.commonprefix([first, second])  # noqa: RUF071 - these are texts: characters are meant
    start = 0 if "_" in shared else shared.rfind(" ") + 1
    return {
        "sentence": f"{first[:start]}_ {field(row, 'continuation', place)}",
        "option1": first[start:],
        "option2": second[start:],
        "answer": str(_gold(row, 2, place) + 1),
    }


def _labelled_choices(row: dict, choices: list[str], place: str) -> dict:
    labels = [chr(ord("A") + index) for index in range(len(choices))]
    return {"choices": {"text": choices, "label": labels}, "answerKey": labels[_gold(row, len(choices), place)]}


def _arc(row: dict, place: str) -> dict:
    question = {"question": field(row, "question", place)}
    if "answerKey" in row:
        return question | {"choices": field(row, "choices", place, dict), "answerKey": row["answerKey"]}
    return question | _labelled_choices(row, _choices(row, "choices", place), place)


def _openbookqa(row: dict, place: str) -> dict:
    if "question_stem" in row:
        question = {"question_stem": field(row, "question_stem", place)}
        return question | {"choices": field(row, "choices", place, dict), "answerKey": field(row, "answerKey", place)}
    return {"question_stem": field(row, "query", place)} | _labelled_choices(
        row, _choices(row, "choices", place), place
    )


def _choices(row: dict, name: str, place: str, count: int | None = None) -> list[str]:
    choices = field(row, name, place, list)
    if not choices or not all(isinstance(choice, str) for choice in choices) or (count and len(choices) != count):
        raise UserError(f"{place}: field {name!r} should be a list of {count or 'several'} texts")
    return choices


def _gold(row: dict, count: int, place: str) -> int:
    gold = field(row, "gold", place, int)
    if not 0 <= gold < count:
        raise UserError(f"{place}: gold {gold} is not the index of one of {count} choices")
    return gold


CONVERTERS: dict[str, Callable[[dict, str], dict]] = {
    "piqa": _piqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
}
