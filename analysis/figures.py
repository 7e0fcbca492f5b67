"""Figures: a short declaration (`FigureSpec`) and one function that draws it from the same numbers as the tables."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullFormatter, NullLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from analysis.cells import Column, Group, groups
from analysis.expected import agrees, experiment
from analysis.runs import Run
from analysis.style import LOOKS, label, looks
from analysis.tables import RATE
from modegpt.escaping import drawable

NO_DATES = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
"""Metadata that would differ between two builds of the same figure."""
DRAWN_FROM = "Drawn from"
"""Where a small PNG keeps the fingerprint of its numbers."""
SMALL_COLOURS = 128
DECADES_WITH_STEPS = 1e5
"""Range up to which a logarithmic axis is labelled at 1, 2 and 5 of each decade."""


@dataclass(frozen=True)
class FigureSpec:
    """Lines of ``y`` over ``point`` (a setting key), one panel a group.

    ``series``: a setting key, of which each value has a line, or the settings behind each line's name.
    ``x``: the frame's column to draw at instead of the setting itself. ``point="layer"`` draws the layers of each run.
    """

    name: str
    title: str
    experiments: tuple[str, ...]
    series: str | Mapping[str, Mapping[str, Any]]
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
    """A series to draw, words on the x axis where the points are names.

    ``spreads`` are sample standard deviations, 0 for a single seed.
    """

    series: Any
    xs: tuple[float, ...] | tuple[str, ...]
    ys: tuple[float, ...]
    spreads: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """What is drawn of one group; ``dense`` is the dense model's number, where there is one."""

    title: str
    lines: tuple[Line, ...]
    dense: float | None


def panels(spec: FigureSpec, runs: Sequence[Run]) -> list[Panel]:
    """The numbers of the figure; empty if no run belongs to it."""
    found = groups(runs, spec.experiments, per_perplexity=spec.per_perplexity, per_text=spec.per_text, where=spec.where)
    return [
        Panel(group.label, tuple(drawn), None if spec.point == "layer" else group.dense(spec.y).mean)
        for group in found
        if (drawn := lines(spec, group))
    ]


def lines(spec: FigureSpec, group: Group) -> list[Line]:
    """The numbers to draw for ``group``."""
    drawn = []
    for name, where in spec.chosen(group.runs).items():
        mine = [run for run in group.runs if agrees(run, where)]
        points = _layers(spec, mine) if spec.point == "layer" else _points(spec, group, mine, where)
        if points:
            drawn.append(Line(name, *map(tuple, zip(*points, strict=True))))
    return drawn


def _layers(spec: FigureSpec, mine: Sequence[Run]) -> list[tuple[Any, float, float]]:
    """Each layer of the run with the first seed, its share removed, and no spread."""
    layers = min(mine, key=lambda run: run.facts["seed_seed"]).record["compression"]["layers"]
    return [(each["index"], spec.y.scale * each["sparsity"], 0.0) for each in layers]


def _points(
    spec: FigureSpec, group: Group, mine: Sequence[Run], where: Mapping[str, Any]
) -> list[tuple[Any, float, float]]:
    """x, mean and spread of every point of a series; sorted by x, unless the points are names."""
    points: list[tuple[Any, float, float]] = []
    for at in dict.fromkeys(run.setting(spec.point) for run in mine):
        cell = group.cell(spec.y, {**where, spec.point: at})
        if cell.mean is not None:
            members = [run for run in mine if agrees(run, {spec.point: at})]
            x = fmean(run.facts[spec.x] for run in members) if spec.x else at if isinstance(at, str) else float(at)
            points.append(
                (drawable(label(x)) if isinstance(x, str) else spec.x_scale * x, cell.mean, cell.spread or 0.0)
            )
    return points if not points or isinstance(points[0][0], str) else sorted(points)


def fingerprint(spec: FigureSpec, drawn: Sequence[Panel]) -> str:
    """SHA-256 (hex) of every number and title of the figure: what tells a stale picture from a current one."""
    return hashlib.sha256(repr((spec.title, spec.x_label, spec.y_label, drawn)).encode()).hexdigest()


def draw(spec: FigureSpec, drawn: Sequence[Panel]) -> Figure:
    """The figure of these panels."""
    present = {line.series for panel in drawn for line in panel.lines}
    names = list(dict.fromkeys(name for name in (*_listed(spec), *sorted(present, key=str)) if name in present))
    styles = looks(names, of_methods=spec.series == "method" or not isinstance(spec.series, str))
    rows, columns = -(-len(drawn) // 2), min(2, len(drawn))
    figure = Figure(figsize=(4.2 * columns + 0.4, 3.1 * rows + 0.9), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, panel in zip(axes, drawn, strict=False):
        _draw_panel(axis, spec, panel, styles)
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    _legend(figure, [*(_name(spec, name) for name in names), "dense"], ncols=4 if columns > 1 else 2)
    spreads = any(any(line.spreads) for panel in drawn for line in panel.lines)
    between = " " if columns > 1 else "\n"  # one panel is too narrow for both on a line
    bars = f"{between}(bars: sample standard deviation over seeds)" if spreads else ""
    figure.suptitle(spec.title + bars, fontsize=10)
    return figure


def save(figure: Figure, path: Path) -> list[Path]:
    """Write ``path`` as PNG and as PDF."""
    paths = [path.with_suffix(f".{form}") for form in NO_DATES]
    for target, (form, metadata) in zip(paths, NO_DATES.items(), strict=True):
        figure.savefig(target, dpi=150, format=form, metadata=metadata)
        figure.set_layout_engine("none")  # laid out by the first; the second is the same picture
    return paths


def save_small(png: Path, target: Path, drawn_from: str) -> None:
    """Copy ``png`` in a few colours, which is a quarter of its size; ``drawn_from`` is its numbers' fingerprint."""
    info = PngInfo()
    info.add_text(DRAWN_FROM, drawn_from)
    with Image.open(png) as image:
        image.convert("RGB").quantize(SMALL_COLOURS, Image.Quantize.FASTOCTREE).save(
            target, optimize=True, pnginfo=info
        )


def _listed(spec: FigureSpec) -> list[Any]:
    """The series in the order of the legend: methods by looks, others as the experiments or the figure list them."""
    if not isinstance(spec.series, str):
        return list(spec.series)
    if spec.series == "method":
        return list(LOOKS)
    return [settings.get(spec.series) for name in spec.experiments for settings in experiment(name).settings]


def _legend(figure: Figure, names: Sequence[str], ncols: int) -> None:
    """One legend for all panels, if they show more than one of ``names``."""
    handles = {
        text: handle for axis in figure.axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    wanted = [name for name in names if name in handles]
    if len(wanted) > 1:
        figure.legend(
            [handles[name] for name in wanted],
            wanted,
            loc="outside lower center",
            ncols=ncols,
            frameon=False,
            fontsize=8,
        )


def _draw_panel(axis: Axes, spec: FigureSpec, panel: Panel, styles: Mapping[Any, tuple[str, str, str]]) -> None:
    of_names = isinstance(panel.lines[0].xs[0], str)
    for line in panel.lines:
        colour, marker, dash = styles[line.series]
        axis.errorbar(
            line.xs,
            line.ys,
            yerr=line.spreads if any(line.spreads) else None,
            capsize=2,
            label=_name(spec, line.series),
            color=colour,
            marker=marker,
            linestyle="none" if of_names else dash,
            linewidth=2.0 if line.series == "modegpt" else 1.2,
            markersize=5,
        )
    if panel.dense is not None:
        axis.axhline(panel.dense, color="#444444", linewidth=0.9, linestyle=(0, (1, 2)), label="dense")
    _scale_x(axis, spec, [x for line in panel.lines for x in line.xs if not isinstance(x, str)])
    _scale_y(axis, spec, [y for line in panel.lines for y in line.ys], from_zero=of_names)
    axis.set_title("\n".join(map(drawable, panel.title.split(", ", 1))), fontsize=8)
    axis.set_xlabel(spec.x_label, fontsize=9)
    axis.set_ylabel(spec.y_label, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    axis.grid(color="#E5E5E5", linewidth=0.6)


def _scale_x(axis: Axes, spec: FigureSpec, xs: Sequence[float]) -> None:
    if spec.log_x:
        axis.set_xscale("log")
        if max(xs) / min(xs) < 1e4:
            axis.set_xticks(sorted(set(xs)), minor=False)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_locator(NullLocator())
    if spec.x_scale == 100:
        axis.xaxis.set_major_locator(MultipleLocator(10))
    if spec.point == "layer":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _scale_y(axis: Axes, spec: FigureSpec, ys: Sequence[float], *, from_zero: bool) -> None:
    low, high = min(ys), max(ys)
    if spec.log_y and high > 3 * low:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < DECADES_WITH_STEPS * low else (1,)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    if spec.point == "layer":
        axis.set_ylim(0, None)
    if from_zero:
        axis.margins(x=0.3)
        axis.set_ylim(0, 1.1 * high)


def _name(spec: FigureSpec, series: Any) -> str:
    return f"{100 * series:g} % removed" if spec.series == RATE else drawable(label(series))
