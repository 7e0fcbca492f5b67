"""One record as two pictures: its scores against dense, and where it removed what.

Colours are Okabe and Ito's, told apart by the colour-blind; hatches and lightness tell them apart in grey.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modegpt.errors import UserError
from modegpt.escaping import drawable
from modegpt.files import replacing
from modegpt.records.scores import Score, accuracies, perplexities

DENSE: dict[str, Any] = {"color": "#BBBBBB", "edgecolor": "#333333", "linewidth": 0.6}
COMPRESSED: dict[str, Any] = {"color": "#0072B2", "edgecolor": "#333333", "linewidth": 0.6, "hatch": "//"}
REMOVED: dict[str, Any] = {"color": "#0072B2", "edgecolor": "#333333", "linewidth": 0.6}
TARGET = "#D55E00"
MODULES = {  # record key: (title, colour)
    "mlp": ("MLP channels kept", "#009E73"),
    "query_key": ("Query-key dims kept per head", "#56B4E9"),
    "value_output": ("Value-output dims kept per head", "#E69F00"),
}
LOG_FROM = 10.0  # perplexities further apart than this factor share a logarithmic axis


def save_pictures(record: Mapping[str, Any], directory: Path, *, replace: bool = True) -> list[Path]:
    """Write ``scores.png`` (if anything was scored) and ``layers.png`` (of a compressed model); returns their paths.

    Without ``replace`` only those that are not there. Raises UserError naming the picture that cannot be written.
    """
    figures: dict[str, Callable[[Mapping[str, Any]], Figure]] = {}
    if any((perplexities(record), accuracies(record))):
        figures["scores.png"] = scores_figure
    if record["compression"] is not None:
        figures["layers.png"] = layers_figure
    paths = [directory / name for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        if path.exists() and not replace:
            continue
        try:
            with replacing(path) as temporary:  # a run that is killed here leaves no half picture
                figure(record).savefig(temporary, dpi=150, format="png")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
    return paths


def scores_figure(record: Mapping[str, Any]) -> Figure:
    """Perplexities and zero-shot accuracies of the dense and the compressed model, side by side."""
    panels = [
        panel
        for panel in ((perplexities(record), _draw_perplexities), (accuracies(record), _draw_accuracies))
        if panel[0]
    ]
    widths = [1.2 + 0.9 * len(scores) for scores, _ in panels]
    figure = Figure(figsize=(max(sum(widths) + 1.0, 5.0), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for axis, (scores, draw) in zip(axes, panels, strict=True):
        draw(axis, scores)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9, borderaxespad=0.1)
    figure.suptitle(_title(record), fontsize=11)
    return figure


def layers_figure(record: Mapping[str, Any]) -> Figure:
    """Sparsity of every layer against the target, and below it what each layer kept of each module."""
    compression = record["compression"]
    layers = compression["layers"]
    modules = [module for module in MODULES if any(layer["ranks"].get(module) is not None for layer in layers)]
    width = min(max(6.4, 3.0 * len(modules), 0.22 * len(layers)), 14.0)
    figure = Figure(figsize=(width, 5.4 if modules else 3.2), layout="constrained")
    top, *below = figure.subfigures(2 if modules else 1, 1, squeeze=False, height_ratios=[1.1, 1] if modules else None)[
        :, 0
    ]

    axis = top.subplots()
    indices = [layer["index"] for layer in layers]
    axis.bar(indices, [100 * (layer["sparsity"] or 0.0) for layer in layers], width=0.8, **REMOVED)
    target = 100 * compression["target_sparsity"]
    axis.axhline(target, color=TARGET, linestyle="--", linewidth=1.4, label=f"target {target:g} %")
    axis.set_ylabel("Block-linear weights\nremoved (%)")
    axis.set_xlabel("Layer")
    axis.set_ylim(0, min(100, 1.25 * max(target, *axis.dataLim.intervaly)) or 1)
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, borderaxespad=0.0, fontsize=9)
    _dress(axis)
    _whole_layers(axis, indices)

    full = compression.get("full_ranks", {})
    for row in below:
        for axis, module in zip(row.subplots(1, len(modules), squeeze=False)[0], modules, strict=True):
            _draw_ranks(axis, layers, module, full.get(module))
    figure.suptitle(_title(record), fontsize=11)
    return figure


def _draw_perplexities(axis: Axes, scores: list[Score]) -> None:
    values = _draw_pairs(axis, scores, scale=1.0)
    if max(values) / min(values) > LOG_FROM:
        axis.set_yscale("log")
        axis.set_ylim(min(values) / 2, max(values) * 2)
    else:
        axis.set_ylim(0, 1.15 * max(values))
    axis.set_ylabel("Perplexity (lower is better)")
    axis.set_xticks(range(len(scores)), [_broken(score.name.removeprefix("ppl_")) for score in scores])
    axis.set_xlabel("Text and window (tokens)")


def _draw_accuracies(axis: Axes, scores: list[Score]) -> None:
    _draw_pairs(axis, scores, scale=100.0)
    axis.set_ylim(0, 108)
    axis.set_yticks(range(0, 101, 20))
    axis.set_ylabel("Zero-shot accuracy (%)")
    axis.set_xticks(range(len(scores)), [_broken(score.label) for score in scores])
    axis.set_xlabel("Task (bars: one standard error)")


def _draw_pairs(axis: Axes, scores: list[Score], scale: float) -> list[float]:
    """Dense and compressed bars in pairs, their values on top; returns the values drawn."""
    alone = all(score.compressed is None for score in scores)
    offset = 0.0 if alone else 0.2
    whole = [(index - offset, score.dense, score.dense_stderr) for index, score in enumerate(scores)]
    small = [(index + offset, score.compressed, score.compressed_stderr) for index, score in enumerate(scores)]
    drawn: list[float] = []
    for style, label, points in ((DENSE, "dense", whole), (COMPRESSED, "compressed", small)):
        shown = [(x, scale * value, scale * (stderr or 0.0)) for x, value, stderr in points if value is not None]
        if not shown:
            continue
        positions, heights, errors = zip(*shown, strict=True)
        axis.bar(positions, heights, width=0.4, label=label, **style)
        if any(errors):
            axis.errorbar(positions, heights, yerr=errors, fmt="none", ecolor="#333333", capsize=2, linewidth=0.9)
        for x, height, error in shown:  # above the error bar, not through it
            axis.annotate(
                _short(height), (x, height + error), (0, 2), textcoords="offset points", ha="center", fontsize=7
            )
        drawn += heights
    axis.set_xlim(-0.6, len(scores) - 0.4)
    _dress(axis)
    return drawn


def _draw_ranks(axis: Axes, layers: list[Mapping[str, Any]], module: str, full: int | None) -> None:
    title, colour = MODULES[module]
    kept = [(layer["index"], layer["ranks"][module]) for layer in layers if layer["ranks"].get(module) is not None]
    indices, ranks = zip(*kept, strict=True)
    axis.bar(indices, ranks, width=0.8, color=colour, edgecolor="#333333", linewidth=0.6)
    if full is not None:
        axis.axhline(full, color="#333333", linestyle=":", linewidth=1.2)
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axis.annotate(f"dense {full}", (1, full), (0, 2), **place, ha="right", fontsize=7)
    axis.set_ylim(0, 1.15 * max(*ranks, full or 1))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("Layer")
    _dress(axis)
    _whole_layers(axis, [layer["index"] for layer in layers])


def _dress(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    axis.grid(axis="y", color="#E0E0E0", linewidth=0.6)
    axis.tick_params(labelsize=8)
    axis.xaxis.label.set_fontsize(9)
    axis.yaxis.label.set_fontsize(9)


def _whole_layers(axis: Axes, indices: list[int]) -> None:
    """Ticks on whole layers, at most about ten of them."""
    axis.set_xticks(indices[:: -(-len(indices) // 10)])


def _title(record: Mapping[str, Any]) -> str:
    compression = record["compression"]
    if compression is None:
        return f"{drawable(record['model']['name'])}, dense"
    removed = f"{100 * compression['achieved_sparsity']:.1f} % of the block-linear weights removed"
    return f"{drawable(record['model']['name'])}, {compression['method']}, {removed}"


def _broken(label: str) -> str:
    """A label in lines short enough to stand beside its neighbours."""
    return drawable(label.replace("_", "\n").replace(" ", "\n", 1))


def _short(value: float) -> str:
    return (
        f"{value:.1e}"
        if value >= 1e4
        else f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
    )
