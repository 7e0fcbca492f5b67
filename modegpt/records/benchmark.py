"""Benchmark records: one JSON file each under ``results/bench``, written whole or not at all."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modegpt.errors import UserError
from modegpt.files import write_text
from modegpt.records.paths import portable
from modegpt.records.provenance import command_line, provenance
from modegpt.records.schema import json_problems
from modegpt.records.store import timestamp

FOLDER = Path("results") / "bench"


def write_benchmark(path: Path, content: Mapping[str, Any]) -> Path:
    """Write ``content`` with when, where and by which command it was measured to ``path``.

    An earlier measurement there is replaced.

    Raises UserError for NaN, inf and what JSON cannot hold, or a place that cannot be written.
    """
    program = f"python {Path(sys.argv[0]).parent.name}/{Path(sys.argv[0]).name}"
    record = {
        "created": timestamp(),
        "command": command_line(sys.argv[1:], program=program),
        "provenance": provenance(),
    } | portable(dict(content))
    for problem in json_problems(record):
        raise UserError(problem)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path
