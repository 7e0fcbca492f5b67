"""What an experiment file promises, so that what is missing can be named with the command that produces it."""

import itertools
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Transformer
from omegaconf import OmegaConf

from analysis.runs import Run, hashable

DIRECTORY = Path(__file__).resolve().parent.parent / "experiments"
NOT_DECISIVE = ("output", "hydra", "quiet", "threads", "tracking", "cache", "+experiments")


@dataclass(frozen=True)
class Experiment:
    """One file of ``experiments/``: its folder in the store and every combination of its settings, the model apart."""

    name: str
    folder: str
    settings: tuple[Mapping[str, Any], ...]

    @property
    def swept(self) -> set[str]:
        """The keys that the file sets."""
        return set(self.settings[0])

    def runs(self, runs: Iterable[Run]) -> list[Run]:
        """The members of ``runs`` that belong to this experiment."""
        promised = {tuple(each.values()) for each in self.settings}
        return [run for run in runs if run.facts["experiment"] == self.folder and self._of(run) in promised]

    def missing(self, runs: Iterable[Run]) -> list[Mapping[str, Any]]:
        """The settings for which ``runs`` (all of one model and calibration) have no record.

        Empty if the experiment was not begun.
        """
        own = self.runs(runs)
        if not any(self.began(run) for run in own):
            return []  # another experiment's runs that happen to fit
        present = {self._of(run) for run in own}
        return [each for each in self.settings if tuple(each.values()) not in present]

    def began(self, run: Run) -> bool:
        """Whether the run was started by this file; files that share a folder share runs."""
        return f"+experiments={self.name}" in _words(run.record["command"])

    def _of(self, run: Run) -> tuple:
        return tuple(run.setting(key) for key in self.settings[0])

    def command(self, sibling: Run) -> str:
        """The command that runs what is missing beside ``sibling``."""
        given = [word for word in _words(sibling.record["command"])[1:] if not word.startswith("-")]
        kept = [
            word
            for word in given
            if (key := word.partition("=")[0]) not in self.swept - {"model"} and not key.startswith(NOT_DECISIVE)
        ]
        return shlex.join(["modegpt", "--multirun", f"+experiments={self.name}", *kept])


def _words(command: str) -> list[str]:
    """The words of a command line; none of one that a shell could not read."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


def agrees(run: Run, settings: Mapping[str, Any]) -> bool:
    """Whether the run has these settings; a frozenset allows any of its members."""
    return all(allows(value, run.setting(key)) for key, value in settings.items())


def allows(wanted: Any, value: Any) -> bool:
    """Whether ``value`` is ``wanted``, or one of a frozenset of them."""
    return value in wanted if isinstance(wanted, frozenset) else value == wanted


@cache
def experiment(name: str) -> Experiment:
    """Read ``experiments/<name>.yaml``."""
    content = OmegaConf.load(DIRECTORY / f"{name}.yaml")
    choices: dict[str, list] = {}
    for override in OverridesParser.create().parse_overrides(
        [f"{key}={value}" for key, value in content.hydra.sweeper.params.items()]
    ):
        several, key = override.is_sweep_override(), override.get_key_element().lstrip("+")
        if key != "model":
            values = override.sweep_iterator(Transformer.identity) if several else [override.value()]
            choices[key] = list(map(hashable, values))
    choices.setdefault("seed", [0])  # conf/config.yaml's
    combinations = itertools.product(*choices.values())
    return Experiment(
        name=name,
        folder=content.output.experiment,
        settings=tuple(dict(zip(choices, each, strict=True)) for each in combinations),
    )
