"""The store of invented records, as a fixture."""

import importlib.util
import types
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def store() -> types.ModuleType:
    """``fixture_store.py``: ``write(root, experiment, ...)``."""
    spec = importlib.util.spec_from_file_location("fixture_store", Path(__file__).parent / "fixture_store.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
