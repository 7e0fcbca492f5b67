"""The project's scripts, which are no packages, as modules."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

CHECKOUT = Path(__file__).resolve().parent.parent


def load_script(name: str) -> ModuleType:
    """``<folder>/<name>``, imported as when it is run: with its siblings at hand."""
    folder, _, module = name.rpartition("/")
    sys.path.insert(0, str(CHECKOUT / folder))
    try:
        return import_module(module)
    finally:
        sys.path.remove(str(CHECKOUT / folder))
