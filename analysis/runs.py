"""The finished runs of a store."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from analysis.ingredients import combination
from modegpt.errors import UserError
from modegpt.records.frame import row
from modegpt.records.store import RecordStore, canonical

VERSIONED = ("torch", "transformers", "lm_eval")
"""Packages whose version can change a score."""


@dataclass(frozen=True)
class Run:
    """One record: ``facts`` as in `modegpt.records.frame`, the configuration, and its place in the store."""

    facts: Mapping[str, Any]
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    path: str
    _settings: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def setting(self, key: str) -> Any:
        """The configuration at ``key``, made hashable. Of a group (``decomposition/mlp``): the name of its option."""
        if key not in self._settings:
            self._settings[key] = hashable(setting(self.config, key))
        return self._settings[key]

    @property
    def perplexities(self) -> list[str]:
        """The names of its perplexities: ``ppl_<text>_<window>``."""
        return list(self.record["metrics"]["dense"]["perplexity"])

    @cached_property
    def version(self) -> str:
        """What two runs must share to be compared: record format, model, package versions, tests and their metrics."""
        model, decides = self.record["model"], self.record["identity"]["decides"]
        packages = {name: self.record["provenance"]["packages"].get(name) for name in VERSIONED}
        metrics = {task: score.get("metric") for task, score in self.record["metrics"]["dense"]["zeroshot"].items()}
        parts = [
            self.record["schema_version"],
            model["weights_sha256"],
            packages,
            decides.get("evaluation"),
            metrics,
            sorted(self.perplexities),
        ]
        return canonical({"version": parts})

    @cached_property
    def variant(self) -> str:
        """Everything that was chosen but the seeds and the calibration draw: what the runs behind one mean share."""
        decides = {
            key: value
            for key, value in self.record["identity"]["decides"].items()
            if key not in ("seed", "calibration")
        }
        calibration = self.record["calibration"] or {}
        return canonical(
            decides
            | {"calibration": [calibration.get(key) for key in ("source", "num_samples", "sequence_length", "bos")]}
        )


def setting(config: Mapping[str, Any], key: str) -> Any:
    """See `Run.setting`; None where the configuration has no such key."""
    node: Any = config
    for part in re.split(r"[./]", key):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node.get("name") if isinstance(node, Mapping) and "name" in node else node


def hashable(value: Any) -> Any:
    """Mappings as sorted pairs, lists as tuples, leaves as they are: equal settings stay equal."""
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), hashable(member)) for key, member in value.items()))
    return tuple(map(hashable, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Refusal:
    """A record that may not enter a table, and why."""

    path: str
    reason: str


def damaged(results: Path, path: Path, read: Callable[[Path], object]) -> list[Refusal]:
    """The file ``path`` below ``results``, where ``read`` cannot make anything of it."""
    try:
        read(path)
    except UserError as error:
        return [Refusal(path.relative_to(results).as_posix(), str(error).removeprefix(f"{path}: "))]
    return []


def load_runs(root: Path | str) -> list[Run]:
    """Every record under ``root`` that is whole and unchanged."""
    return read_runs(root)[0]


def read_runs(root: Path | str) -> tuple[list[Run], list[Refusal]]:
    """Every record under ``root``, checked, and those that are broken or were changed."""

    def run(path: Path, record: Mapping[str, Any]) -> Run:
        made = Run(
            facts=row(record),
            config=annotated(record["config"]),
            record=record,
            path=path.relative_to(root).as_posix(),
        )
        assert made.version and made.variant  # here, where a record of another form is left out
        return made

    runs, left_out = RecordStore(root).survey(run)
    return runs, [Refusal(*_place(problem, root)) for problem in left_out]


def _place(problem: str, root: Path | str) -> tuple[str, str]:
    """The file that a problem names, as runs name theirs, and the rest of it."""
    path, _, reason = problem.removeprefix(f"{root}/").partition(": ")
    return path, reason


def annotated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with what tables ask for by a name of its own.

    ``text`` of the calibration; ``module`` and ``module_rate`` where exactly one module type is compressed;
    ``experiments/ingredients``, the combination that was chosen.
    """
    config = dict(config)
    calibration = dict(config.get("calibration") or {})
    file = calibration.get("path") if calibration.get("source") in ("jsonl", "text") else None
    calibration["text"] = Path(file).name if file else calibration.get("source")
    rates = (config.get("compression") or {}).get("module_sparsity") or {}
    compressed = [module for module, rate in rates.items() if rate]
    alone = compressed[0] if len(compressed) == 1 and None not in rates.values() else None
    ingredients = combination(config.get("method") or {})
    return config | {
        "calibration": calibration,
        "module": alone,
        "module_rate": rates.get(alone),
        "experiments": {"ingredients": ingredients},
    }
