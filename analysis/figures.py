"""Figures: a short declaration (`FigureSpec`) and one function that draws it from the same numbers as the tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullFormatter, NullLocator

from analysis.cells import Column, Group, groups
from analysis.expected import agrees, experiment
from analysis.runs import Run
from analysis.style import LOOKS, label, looks
from analysis.tables import RATE

NO_DATES = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
"""Metadata that would differ between two builds of the same figure."""
DECADES_WITH_STEPS = 1e5
"""Range up to which a logarithmic axis is labelled at 1, 2 and 5 of each decade."""


@dataclass(frozen=True)
class FigureSpec:
    """Lines of ``y`` over ``point`` (a setting key), one a value of ``series`` or one for each that it names, one panel a group.

    ``x``: the frame's column to draw at instead of the setting itself. ``point="layer"`` draws the layers of each run.
    """

    name: str
    title: str
    experiments: tuple[str, ...]
    series: str | Mapping[str, Mapping[str, Any]]  # a setting key, or the settings behind each name
    y: Column
    point: str
    x_label: str
    y_label: str
    x: str | None = None
    x_scale: float = 1.0
    log_x: bool = False
    log_y: bool = False
    where: Mapping[str, Any] = field(default_factory=dict)
    per_perplexity: bool = True
    per_text: bool = True

    def chosen(self, runs: Sequence[Run]) -> dict[Any, Mapping[str, Any]]:
        """Each series and the settings of its runs."""
        if isinstance(self.series, str):
            return {name: {self.series: name} for name in dict.fromkeys(run.setting(self.series) for run in runs)}
        return {name: where for name, where in self.series.items() if any(agrees(run, where) for run in runs)}


@dataclass(frozen=True)
class Line:
    """A series to draw, words on the x axis where the points are names; ``spreads`` are sample standard deviations, 0 for a single seed."""

    series: Any
    xs: tuple[float, ...] | tuple[str, ...]
    ys: tuple[float, ...]
    spreads: tuple[float, ...]


def draw(spec: FigureSpec, runs: Sequence[Run]) -> Figure | None:
    """The figure, or None if no run belongs to it."""
    found = groups(runs, spec.experiments, per_perplexity=spec.per_perplexity, per_text=spec.per_text, where=spec.where)
    panels = [(group, drawn) for group in found if (drawn := lines(spec, group))]
    if not panels:
        return None
    present = {line.series for _, drawn in panels for line in drawn}
    names = list(dict.fromkeys(name for name in (*_listed(spec), *sorted(present, key=str)) if name in present))
    styles = looks(names, of_methods=spec.series == "method" or not isinstance(spec.series, str))
    rows = -(-len(panels) // 2)
    columns = min(2, len(panels))
    figure = Figure(figsize=(4.2 * columns + 0.4, 3.1 * rows + 0.9), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (group, drawn) in zip(axes, panels, strict=False):
        _panel(axis, spec, group, drawn, styles)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = {
        text: handle for axis in figure.axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    wanted = [text for text in (*(_name(spec, name) for name in names), "dense") if text in handles]
    if len(wanted) > 1:
        figure.legend(
            [handles[text] for text in wanted],
            wanted,
            loc="outside lower center",
            ncols=4 if columns > 1 else 2,
            frameon=False,
            fontsize=8,
        )
    spreads = any(any(line.spreads) for _, drawn in panels for line in drawn)
    between = " " if columns > 1 else "\n"  # one panel is too narrow for both on a line
    figure.suptitle(
        spec.title + (f"{between}(bars: sample standard deviation over seeds)" if spreads else ""), fontsize=10
    )
    return figure


def lines(spec: FigureSpec, group: Group) -> list[Line]:
    """The numbers to draw for ``group``."""
    drawn = []
    for name, where in spec.chosen(group.runs).items():
        mine = [run for run in group.runs if agrees(run, where)]
        if spec.point == "layer":
            layers = min(mine, key=lambda run: run.facts["seed_seed"]).record["compression"]["layers"]
            drawn.append(
                Line(
                    name,
                    tuple(each["index"] for each in layers),
                    tuple(spec.y.scale * each["sparsity"] for each in layers),
                    (0.0,) * len(layers),
                )
            )
            continue
        points = []
        for at in dict.fromkeys(run.setting(spec.point) for run in mine):
            cell = group.cell(spec.y, {**where, spec.point: at})
            if cell.mean is not None:
                members = [run for run in mine if agrees(run, {spec.point: at})]
                x = fmean(run.facts[spec.x] for run in members) if spec.x else at if isinstance(at, str) else float(at)
                points.append((label(x) if isinstance(x, str) else spec.x_scale * x, cell.mean, cell.spread or 0.0))
        if points:
            points = points if isinstance(points[0][0], str) else sorted(points)
            drawn.append(Line(name, *map(tuple, zip(*points, strict=True))))
    return drawn


def _listed(spec: FigureSpec) -> list[Any]:
    """The series in the order of the legend: methods by their looks, others as the experiments or the figure list them."""
    if not isinstance(spec.series, str):
        return list(spec.series)
    return (
        list(LOOKS)
        if spec.series == "method"
        else [settings.get(spec.series) for name in spec.experiments for settings in experiment(name).settings]
    )


def save(figure: Figure, path: Path) -> list[Path]:
    """Write ``path`` as PNG and as PDF."""
    paths = [path.with_suffix(f".{form}") for form in NO_DATES]
    for target, (form, metadata) in zip(paths, NO_DATES.items(), strict=True):
        figure.savefig(target, dpi=150, format=form, metadata=metadata)
        figure.set_layout_engine("none")  # laid out by the first; the second is the same picture
    return paths


def _panel(
    axis: Axes, spec: FigureSpec, group: Group, drawn: Sequence[Line], styles: Mapping[Any, tuple[str, str, str]]
) -> None:
    for line in drawn:
        colour, marker, dash = styles[line.series]
        look = {
            "color": colour,
            "marker": marker,
            "linestyle": dash,
            "linewidth": 2.0 if line.series == "modegpt" else 1.2,
            "markersize": 5,
        }
        if isinstance(line.xs[0], str):
            look["linestyle"] = "none"
            axis.margins(x=0.3)
            axis.set_ylim(0, 1.1 * max(y for each in drawn for y in each.ys))
        axis.errorbar(
            line.xs,
            line.ys,
            yerr=line.spreads if any(line.spreads) else None,
            capsize=2,
            label=_name(spec, line.series),
            **look,
        )
    dense = group.dense(spec.y).mean if spec.point != "layer" else None
    if dense is not None:
        axis.axhline(dense, color="#444444", linewidth=0.9, linestyle=(0, (1, 2)), label="dense")
    if spec.log_x:
        axis.set_xscale("log")
        if max(x for line in drawn for x in line.xs) / min(x for line in drawn for x in line.xs) < 1e4:
            axis.set_xticks(sorted({x for line in drawn for x in line.xs}), minor=False)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_locator(NullLocator())
    low = min(y for line in drawn for y in line.ys)
    high = max(y for line in drawn for y in line.ys)
    if spec.log_y and high > 3 * low:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < DECADES_WITH_STEPS * low else (1,)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    if spec.x_scale == 100:
        axis.xaxis.set_major_locator(MultipleLocator(10))
    if spec.point == "layer":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylim(0, None)
    axis.set_title(group.label.replace(", ", "\n", 1), fontsize=8)
    axis.set_xlabel(spec.x_label, fontsize=9)
    axis.set_ylabel(spec.y_label, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    axis.grid(color="#E5E5E5", linewidth=0.6)


def _name(spec: FigureSpec, series: Any) -> str:
    return f"{100 * series:g} % removed" if spec.series == RATE else label(series)
