"""The order of rooms: who may import whom, read from the source of every import, those inside functions included."""

import ast
import functools
import graphlib
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent

ROOMS = (
    "modegpt.escaping",
    "modegpt.errors",
    "modegpt.termination",
    "modegpt.progress",
    "modegpt.files",
    "modegpt.cache",
    "modegpt.decompositions",
    "modegpt.allocation",
    "modegpt.data",
    "modegpt.models",
    "modegpt.cost",
    "modegpt.calibration",
    "modegpt.evaluation",
    "modegpt.config",
    "modegpt.methods",
    "modegpt.recovery",
    "modegpt.backend",
    "modegpt.streaming",
    "modegpt.records",
    "modegpt.prepare",
    "modegpt.space",
    "modegpt.run",
    "modegpt.api",
    "modegpt",
    "modegpt.cli",
    "modegpt.__main__",
    "analysis",
    "tools",
    "benchmarks",
    "experiments",
)
"""From the ground up: a room imports rooms below it only. ``modegpt`` is the package's own face."""

PURE = ("modegpt/decompositions/", "modegpt/allocation/", "modegpt/calibration/moments.py")
"""The mathematics: of other packages it knows PyTorch alone, of this one itself and the errors."""

CONFINED = {
    "transformers.models": "modegpt/models/",
    "hydra": "modegpt/cli/",
    "omegaconf": "modegpt/cli/",
    "wandb": "modegpt/records/tracking.py",
}
"""Packages that one place of ``modegpt`` alone imports."""


def sources() -> dict[str, Path]:
    """The file of every module outside the tests, by its dotted name."""
    folders = {room.partition(".")[0] for room in ROOMS}
    paths = {path.relative_to(CHECKOUT): path for folder in folders for path in (CHECKOUT / folder).rglob("*.py")}
    return {".".join(place.with_suffix("").parts).removesuffix(".__init__"): path for place, path in paths.items()}


MODULES = sources()


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def module_of(name: str) -> str:
    """The module that ``name``, dotted, is or stands in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def room_of(module: str) -> str:
    rooms = [room for room in ROOMS if module == room or (room != "modegpt" and within(module, room))]
    assert len(rooms) == 1, f"{module} has no place in the order of rooms"
    return rooms[0]


def place_of(module: str) -> str:
    return MODULES[module].relative_to(CHECKOUT).as_posix()


@functools.cache
def imported(module: str) -> frozenset[str]:
    """Every module that a file imports anywhere, and every name that it imports from one, dotted."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def imported_modules(module: str) -> set[str]:
    """The project's own modules among them."""
    return {target for name in imported(module) if (target := module_of(name)) and target != module}


def test_a_room_imports_rooms_below_it_only() -> None:
    upwards = {
        f"{module} -> {target}"
        for module in MODULES
        for target in imported_modules(module)
        if ROOMS.index(room_of(target)) > ROOMS.index(room_of(module))
    }
    assert not upwards


def test_no_files_import_each_other_in_a_circle() -> None:
    graphlib.TopologicalSorter({module: imported_modules(module) for module in MODULES}).prepare()


def test_the_mathematics_knows_no_model_and_no_configuration() -> None:
    def known(name: str) -> bool:
        if within(name, "modegpt"):
            return within(name, "modegpt.errors") or place_of(module_of(name)).startswith(PURE)
        return name.partition(".")[0] in {"torch", *sys.stdlib_module_names}

    pure = [module for module in MODULES if place_of(module).startswith(PURE)]
    assert not {f"{module} -> {name}" for module in pure for name in imported(module) if not known(name)}


def test_each_confined_package_is_imported_in_its_place_alone() -> None:
    modules = [module for module in MODULES if within(module, "modegpt")]
    importers = {
        package: {place_of(module) for module in modules if any(within(name, package) for name in imported(module))}
        for package in CONFINED
    }
    assert all(importers.values()), "a rule with nothing to guard"
    assert not {
        f"{place} -> {package}"
        for package, places in importers.items()
        for place in places
        if not place.startswith(CONFINED[package])
    }


def test_every_rule_has_something_to_guard() -> None:
    assert {room_of(module) for module in MODULES} == set(ROOMS)
    assert all(any(place_of(module).startswith(place) for module in MODULES) for place in PURE)
