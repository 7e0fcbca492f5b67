"""The combinations of modegpt_plus's ingredients that ``experiments/ingredients.yaml`` holds."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from modegpt.cli.schema import ingredients
from modegpt.config import defaults
from modegpt.methods.plus.switches import Switches

OFF = {"centred": False, "fisher": []}
"""Switches that were taken out, as a record has them that is of today's code."""
FORMERLY = {"centred": True, "query_key": "rescaled"}
"""The defaults of then for which today's are others."""


@cache
def combinations() -> dict[str, dict[str, Any]]:
    """For each name that can be run the whole method that it makes of the defaults."""
    return _of("switches")


@cache
def taken_out() -> dict[str, dict[str, Any]]:
    """The same for those that records alone know."""
    return _of("recorded")


def _of(kind: str) -> dict[str, dict[str, Any]]:
    everything = {"name": "modegpt_plus", **defaults(Switches)}
    return {name: everything | each[kind] for name, each in ingredients().items() if kind in each}


def combination(method: Mapping[str, Any]) -> str | None:
    """Which of the combinations a run's method is; a switch that its record does not know (yet, or any more) was off.

    Recorded with the defaults of then, it is the one that has those of today.
    """
    if method.get("name") != "modegpt_plus":
        return None
    complete = {**combinations()["paper"], **OFF, **method}
    known = {name: OFF | switches for name, switches in combinations().items()} | taken_out()
    if complete | FORMERLY == complete and complete not in known.values():
        complete |= {"centred": False, "query_key": Switches.query_key}
    return next((name for name, switches in known.items() if switches == complete), None)


@cache
def title(name: str) -> str:
    """What the file says the combination is."""
    return ingredients()[name]["title"]
