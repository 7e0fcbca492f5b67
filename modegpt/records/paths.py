"""Paths as a record may hold them: nothing that names one machine or one user.

What is relative stays as it was typed; what is absolute becomes relative to the working directory if it lies inside it,
else ``.../<last part>``. What such a path pointed to is identified by the fingerprints in the record.
"""

import re
from pathlib import Path
from typing import Any

ABSOLUTE = re.compile(r"(?:file://|(?<![\w.~)}/-]))/(?:[\w.@%+~-]+/)*[\w.@%+~-]+/?")


def portable(value: Any, directory: Path | None = None) -> Any:
    """``value`` (text, or nested mappings and lists of it) without absolute paths; see the module's rule.

    ``directory``: the working directory that paths become relative to, by default the present one.
    """
    directory = directory or Path.cwd()
    if isinstance(value, dict):
        return {key: portable(member, directory) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [portable(member, directory) for member in value]
    if not isinstance(value, str):
        return value
    key, equals, path = value.rpartition("=")
    if path.startswith("/") and "," not in path and " " not in key:  # a setting that is one path
        return key + equals + _portable_path(path, directory)
    return ABSOLUTE.sub(lambda match: _portable_path(match.group().removeprefix("file://"), directory), value)


def _portable_path(path: str, directory: Path) -> str:
    if Path(path).is_relative_to(directory):
        return str(Path(path).relative_to(directory))
    return f".../{Path(path).name}"
