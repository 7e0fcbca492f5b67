"""What an experiment file promises: which runs keep it, and what is missing, with the command that produces it."""

import itertools
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Transformer
from omegaconf import OmegaConf

from analysis.runs import Refusal, Run, hashable, setting

DIRECTORY = Path(__file__).resolve().parent.parent / "experiments"
NOT_DECISIVE = ("output", "hydra", "quiet", "threads", "tracking", "cache", "+experiments=")
PROTOCOL = "+experiments/protocol="
"""What a command puts in front of the name of a protocol that it adds to an experiment."""


@dataclass(frozen=True)
class Experiment:
    """One file of ``experiments/``: its folder in the store and every combination of its settings, the model apart.

    ``limits``: how many tokens of the text and items of each task it scores; None for all.
    """

    name: str
    folder: str
    settings: tuple[Mapping[str, Any], ...]
    limits: tuple[int | None, int | None]

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
            if word.partition("=")[0].lstrip("+") not in self.swept - {"model"} and not word.startswith(NOT_DECISIVE)
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
    content: Any = _composed(DIRECTORY / f"{name}.yaml")
    choices: dict[str, list] = {}
    for override in OverridesParser.create().parse_overrides(
        [f"{key}={value}" for key, value in content.hydra.sweeper.params.items()]
    ):
        several, key = override.is_sweep_override(), override.get_key_element().lstrip("+")
        if key != "model":
            values = override.sweep_iterator(Transformer.identity) if several else [override.value()]
            choices[key] = list(map(hashable, values))
    choices.setdefault("seed", [0])  # conf/config.yaml's
    return Experiment(
        name=name,
        folder=content.output.experiment,
        settings=_product(choices),
        limits=_limits(content),
    )


def _composed(file: Path) -> Any:
    """The file upon the protocol that it names among its defaults."""
    content: Any = OmegaConf.load(file)
    protocols = [each.protocol for each in content.get("defaults", []) if "protocol" in each]
    return OmegaConf.merge(*map(_protocol, protocols), content)


@cache
def _protocol(name: str) -> Any:
    return OmegaConf.load(DIRECTORY / "protocol" / f"{name}.yaml")


def _product(choices: Mapping[str, list]) -> tuple[Mapping[str, Any], ...]:
    return tuple(dict(zip(choices, each, strict=True)) for each in itertools.product(*choices.values()))


def _limits(config: Any) -> tuple[int | None, int | None]:
    """Tokens of the text and items of a task that a configuration limits the scores to."""
    return setting(config, "evaluation.perplexity.limit"), setting(config, "evaluation.zeroshot.limit")


def _promised_limits(run: Run) -> list[tuple[int | None, int | None]]:
    """Those of the file that started the run, where it is one of ours and its folder is the run's, or of the protocol
    that its command adds to the file.
    """
    words = _words(run.record["command"])
    names = [word.partition("=")[2] for word in words if word.startswith("+experiments=")]
    files = [experiment(name) for name in names if (DIRECTORY / f"{name}.yaml").is_file()]
    protocols = [word.removeprefix(PROTOCOL) for word in words if word.startswith(PROTOCOL)]
    added = [_limits(_protocol(name)) for name in protocols if (DIRECTORY / "protocol" / f"{name}.yaml").is_file()]
    return [added[-1] if added else each.limits for each in files if each.folder == run.facts["experiment"]]


def screen(runs: Iterable[Run]) -> tuple[list[Run], list[Refusal]]:
    """Keep what can be compared within each experiment and model: the test sets of its file, one version.

    A part of a test set is one where the experiment's file says how much of it is scored.

    Of several versions the one with most records stays (the newest of equals), so that one stray run cannot displace a
    table.
    """
    kept, refused = [], []
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.facts["limited"] and _limits(run.config) not in _promised_limits(run):
            refused.append(Refusal(run.path, "limited: scored on a part of the test sets"))
        else:
            groups.setdefault((run.facts["experiment"], run.facts["model"]), []).append(run)
    for group in groups.values():
        counts = Counter(run.version for run in group)
        newest = {
            run.version: max(other.facts["created"] for other in group if other.version == run.version) for run in group
        }
        main = max(counts, key=lambda version: (counts[version], newest[version]))
        kept += [run for run in group if run.version == main]
        reason = "mixed version: another model, package or test set than most records of this experiment and model"
        refused += [Refusal(run.path, reason) for run in group if run.version != main]
    return kept, refused
