"""The combinations of modegpt_plus's ingredients that ``experiments/ingredients.yaml`` holds."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from modegpt.cli.schema import ingredients
from modegpt.config import defaults
from modegpt.methods.plus.switches import Switches


@cache
def combinations() -> dict[str, dict[str, Any]]:
    """For each name the whole method that it makes of the defaults."""
    everything = {"name": "modegpt_plus", **defaults(Switches)}
    return {name: everything | each["switches"] for name, each in ingredients().items()}


def combination(method: Mapping[str, Any]) -> str | None:
    """Which of the combinations a run's method is; a switch that its record does not know yet was off."""
    if method.get("name") != "modegpt_plus":
        return None
    complete = {**combinations()["paper"], **method}
    return next((name for name, switches in combinations().items() if switches == complete), None)


@cache
def title(name: str) -> str:
    """What the file says the combination is."""
    return ingredients()[name]["title"]
