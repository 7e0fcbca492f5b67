"""Numbers with their spread and their origin: what tables show and figures draw."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from analysis.expected import Experiment, agrees, allows, experiment
from analysis.runs import Run
from analysis.style import label
from modegpt.records.scores import difference_stderr


@dataclass(frozen=True)
class Column:
    """A quantity: ``metric`` is a column of the frame, ``perplexity`` (of the group), ``compression_seconds``, or one
    of `DERIVED`.

    ``compared``: one of `COMPARISONS`, with the run of the same seed whose settings differ by ``against``. A number
    nearer to zero than ``floor`` is not compared with, because a share of rounding says nothing. ``within``: only runs
    that removed what was asked for, but for so large a share of the weights.
    """

    label: str
    metric: str
    better: str | None = None  # lower, higher
    scale: float = 1.0
    digits: int = 2
    where: Mapping[str, Any] = field(default_factory=dict)
    compared: str | None = None
    against: Mapping[str, Any] = field(default_factory=dict)
    floor: float = 0.0
    within: float = math.inf


@dataclass(frozen=True)
class Cell:
    """One number of a table: the mean of ``values``, one a seed, in the column's unit. Refused cells have no values."""

    values: tuple[float, ...] = ()
    records: tuple[str, ...] = ()
    refused: str | None = None

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None where there is no number."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Group:
    """Runs that share a model, a calibration text and a perplexity: the unit within which numbers are compared.

    ``where``: what the runs were chosen by.
    """

    model: str
    text: str | None
    perplexity: str | None
    runs: tuple[Run, ...]
    experiments: tuple[Experiment, ...]
    where: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Model, calibration text where there are several, and what the perplexity is of."""
        parts = [self.model]
        if self.text:
            parts.append(f"calibrated on {label(self.text)}")
        if self.perplexity:
            file = self.runs[0].setting("evaluation.perplexity.path")
            name = self.perplexity.removesuffix("_bos")
            source, window = name.removeprefix("ppl_").rsplit("_", 1)
            text = label(Path(file).name) if file and source in ("jsonl", "text") else label(source)
            first = "" if name == self.perplexity else " that begin with a BOS"
            limit = self.runs[0].setting("evaluation.perplexity.limit")
            share = f" of its first {limit:,} tokens" if limit else ""
            parts.append(f"perplexity on {text}, {window}-token windows{share}{first}")
        elif limit := self.runs[0].setting("evaluation.zeroshot.limit"):
            parts.append(f"the first {limit:,} items of each task")
        return ", ".join(parts)

    @cached_property
    def missing(self) -> list[tuple[Experiment, list[Mapping[str, Any]]]]:
        """What the experiments that were begun for this group still owe of what the group is about."""
        owed = [
            (each, [settings for settings in each.missing(self.runs) if self._wants(settings)])
            for each in self.experiments
        ]
        return [(each, settings) for each, settings in owed if settings]

    def cell(self, column: Column, where: Mapping[str, Any]) -> Cell:
        """The number for ``column`` at the settings ``where``; refused if a seed is missing or settings are mixed."""
        where = {**where, **column.where}
        own = self._measured(column, where)
        if column.compared is None:
            return own if isinstance(own, Cell) else _cell(column, own)
        other = self._measured(column, {**where, **column.against})
        if isinstance(own, Cell) or isinstance(other, Cell):
            without = [side for side in (own, other) if isinstance(side, Cell)]
            return min(without, key=lambda cell: cell.refused is not None)  # no number at all comes before a refusal
        references = {run.facts["seed_seed"]: (value, run) for value, run in other if abs(value) >= column.floor}
        pairs = [
            (COMPARISONS[column.compared](column, each, references[seed]), each[1])
            for each in own
            if (seed := each[1].facts["seed_seed"]) in references
        ]
        return _cell(
            column,
            [(value, run) for value, run in pairs if value is not None],
            beside=[run for _, run in references.values()],
        )

    def _measured(self, column: Column, where: Mapping[str, Any]) -> list[tuple[float, Run]] | Cell:
        """The values and their runs; an empty or refused cell if there are none to show."""
        runs = [run for run in self.runs if agrees(run, where) and _missed_by(run) <= column.within]
        values = [(value, run) for run in runs if (value := measure(run, column.metric, self.perplexity)) is not None]
        if not values:
            return Cell()
        if any(_covers(where, settings) for _, owed in self.missing for settings in owed):
            return Cell(refused="incomplete")
        return Cell(refused="mixed settings") if len({run.variant for _, run in values}) > 1 else values

    def _wants(self, settings: Mapping[str, Any]) -> bool:
        return all(allows(wanted, settings[key]) for key, wanted in self.where.items() if key in settings)

    def dense(self, column: Column) -> Cell:
        """The dense model's number for ``column``, the same in every record; none where runs are compared."""
        if column.compared is not None:
            return Cell()
        metric = f"dense_{self.perplexity if column.metric == 'perplexity' else column.metric}"
        found = {run.facts[metric]: run.path for run in self.runs if run.facts.get(metric) is not None}
        value = next(iter(found), None)
        return Cell() if value is None else Cell(values=(column.scale * value,), records=(found[value],))


Measured = tuple[float, Run]
COMPARISONS: dict[str, Callable[[Column, Measured, Measured], float | None]] = {
    "reduction": lambda column, own, other: 1 - own[0] / other[0],
    "increase": lambda column, own, other: own[0] / other[0] - 1,
    "ratio": lambda column, own, other: own[0] / other[0],
    "difference": lambda column, own, other: own[0] - other[0],
    "difference_stderr": lambda column, own, other: difference_stderr(own[1].record, other[1].record, column.metric),
}
"""How a number is set beside that of another run of the same seed; None where it cannot be.

The standard error is that of an accuracy.
"""

DERIVED: dict[str, Callable[[Run, str], float | None]] = {
    "perplexity_ratio": lambda run, name: run.facts[name] / run.facts[f"dense_{name}"],
    "log_increase_per_percent": lambda run, name: _nats(run, name) / (100 * run.facts["achieved_sparsity"]),
    "nats_lost": lambda run, name: _nats(run, name),
    "perplexity_before": lambda run, name: run.facts.get(f"before_{name}"),
}


def _missed_by(run: Run) -> float:
    """How far the share that was removed is from the one asked for."""
    return abs(run.facts.get("achieved_sparsity", 0.0) - run.facts.get("target_sparsity", 0.0))


def measure(run: Run, metric: str, perplexity: str | None) -> float | None:
    """One run's value of ``metric``; None if it has none."""
    if metric == "perplexity":
        return None if perplexity is None else run.facts.get(perplexity)
    if metric == "compression_seconds":
        return sum(
            stage["seconds"]
            for stage in run.record["cost"]["stages"]
            if "compression" in (stage["name"], stage.get("within"))
        )
    if metric in DERIVED:
        return None if perplexity is None or perplexity not in run.facts else DERIVED[metric](run, perplexity)
    return run.facts.get(metric)


def groups(
    runs: Iterable[Run],
    experiments: Iterable[str],
    *,
    per_perplexity: bool,
    per_text: bool = True,
    where: Mapping[str, Any] | None = None,
) -> list[Group]:
    """The groups of the runs of ``experiments``, sorted by model.

    ``per_perplexity``: one for each perplexity that the runs have. ``per_text``: one for each calibration text.
    """
    files = tuple(map(experiment, experiments))
    own = {run.path: run for file in files for run in file.runs(runs) if agrees(run, where or {})}
    texts = {
        model: {run.setting("calibration.text") for run in own.values() if run.facts["model"] == model}
        for model in {run.facts["model"] for run in own.values()}
    }
    found = []
    for model in sorted(texts):
        for text in sorted(texts[model], key=str) if per_text else [None]:
            members = tuple(
                run
                for run in own.values()
                if run.facts["model"] == model and (text is None or run.setting("calibration.text") == text)
            )
            names = members[0].perplexities if per_perplexity else [None]
            found += [
                Group(model, text if per_text and len(texts[model]) > 1 else None, name, members, files, where or {})
                for name in names
            ]
    return found


def _cell(column: Column, values: Iterable[tuple[float, Run]], beside: Iterable[Run] = ()) -> Cell:
    values = list(values)
    records = dict.fromkeys(run.path for run in (*(run for _, run in values), *beside))
    return Cell(values=tuple(column.scale * value for value, _ in values), records=tuple(records))


def _covers(where: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a run with ``settings`` would be part of the number at ``where``."""
    shared = where.keys() & settings.keys()
    return bool(shared) and all(settings[key] == where[key] for key in shared)


def _nats(run: Run, name: str) -> float:
    dense, compressed = (
        run.record["metrics"][which]["perplexity"][name]["mean_nll"] for which in ("dense", "compressed")
    )
    return compressed - dense
