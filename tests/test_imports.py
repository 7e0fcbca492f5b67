"""One import direction, read from the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "modegpt"
MODULES = sorted(PACKAGE.rglob("*.py"))
PURE = ("decompositions/", "allocation/", "calibration/moments.py")
"""The mathematics: PyTorch and the standard library alone."""


def imported(path: Path) -> Iterator[str]:
    """Every module a file imports anywhere, and every name it imports from one, dotted."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_import_direction(path: Path) -> None:
    where, names = place(path), list(imported(path))
    if where.startswith(PURE):
        allowed = (
            "torch",
            "modegpt.errors",
            "modegpt.decompositions",
            "modegpt.allocation",
            "modegpt.calibration.moments",
        )
        strangers = [
            name for name in names if name.split(".")[0] not in sys.stdlib_module_names and not within(name, *allowed)
        ]
        assert not strangers, "the mathematics knows no model and no configuration"
    if not where.startswith(("models/",)):
        assert not [name for name in names if within(name, "transformers.models")]
    if not where.startswith("cli/"):
        assert not [name for name in names if within(name, "hydra", "omegaconf")]
    if where not in ("__main__.py",) and not where.startswith("cli/"):
        assert not [name for name in names if within(name, "modegpt.cli")], "nothing depends on the command line"
    if where != "records/tracking.py":
        assert not [name for name in names if within(name, "wandb")]


def test_every_rule_has_something_to_guard() -> None:
    places = [place(path) for path in MODULES]
    for guarded in (*PURE, "cli/", "records/tracking.py"):
        assert any(where.startswith(guarded) for where in places)
