"""The scripts of ``experiments/``, which are no package, as modules."""

import sys
from importlib import import_module
from types import ModuleType

from analysis.expected import DIRECTORY


def load_script(name: str) -> ModuleType:
    """``experiments/<name>.py``, imported as when it is run: with its siblings at hand."""
    sys.path.insert(0, str(DIRECTORY))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(DIRECTORY))
