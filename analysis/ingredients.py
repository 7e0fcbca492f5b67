"""The combinations of modegpt_plus's ingredients that ``experiments/ingredients/`` holds: one small file each."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

CHECKOUT = Path(__file__).resolve().parent.parent
DIRECTORY = CHECKOUT / "experiments" / "ingredients"
DEFAULTS = CHECKOUT / "conf" / "method" / "modegpt_plus.yaml"


@cache
def combinations() -> dict[str, dict[str, Any]]:
    """For each file the whole method that it makes of the defaults."""
    return {path.stem: _merged(path) for path in sorted(DIRECTORY.glob("*.yaml"))}


def combination(method: Mapping[str, Any]) -> str | None:
    """Which of the combinations a run's method is; a switch that its record does not know yet was off."""
    if method.get("name") != "modegpt_plus":
        return None
    complete = {**combinations()["paper"], **method}
    return next((name for name, switches in combinations().items() if switches == complete), None)


@cache
def title(name: str) -> str:
    """What its file says it is, in the line below the package."""
    return (DIRECTORY / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")


def _merged(path: Path) -> dict[str, Any]:
    content = OmegaConf.load(path)
    bases = [DIRECTORY / f"{name}.yaml" for name in content.pop("defaults", []) if name != "_self_"]
    merged = OmegaConf.merge(OmegaConf.load(DEFAULTS), *map(OmegaConf.load, bases), content)
    return OmegaConf.to_container(merged)
