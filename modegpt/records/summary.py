"""One record as text: dense against compressed, what was removed, what it cost."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modegpt.escaping import printable, printable_lines
from modegpt.records.cost import COST_HEADERS, cost_rows, floor_line, machine_line, stage_name
from modegpt.records.scores import MEAN, Score, all_scores

ABSENT = "-"


def summary(
    record: Mapping[str, Any], *, record_path: Path | str | None = None, pictures: Iterable[Path | str] = ()
) -> str:
    """The table that ends a run.

    Accuracies are in percent with one standard error; ``kept`` is compressed over dense, its error that of a ratio on
    the same items.
    ``record_path`` and ``pictures`` say where the record and its pictures lie, if they do.
    """
    compression, cost = record["compression"], record["cost"]
    rows = [(_label(score), *_cells(score)) for score in all_scores(record)]
    rows += _speed_rows(record["metrics"].get("throughput"))
    rows += _size_rows(record)
    facts = [
        ("seconds", f"{sum(stage['seconds'] for stage in cost['stages']):.1f}", _stages(cost["stages"])),
        ("peak memory", ", ".join(f"{device} {_gib(peak)}" for device, peak in cost["peak_memory_bytes"].items()), ""),
    ]
    measured = [("compression", floor_line(cost)), ("machine", machine_line(cost))]
    facts += [(name, line, "") for name, line in measured if line]
    if recovery := (compression or {}).get("recovery"):
        facts.append(
            (
                "recovery",
                f"{recovery['name']} on {recovery['targets']}, {recovery['num_steps']} steps",
                _before(all_scores(record)),
            )
        )
    places = [("record", record_path)] if record_path else []
    places += [("picture", picture) for picture in pictures]
    width = max(len(name) for name, *_ in facts) + 2
    blocks = [
        printable_lines(_title(record, compression)),
        text_table(["", "dense", "compressed", "kept"], rows),
        text_table(COST_HEADERS, cost_rows(cost)) if "machine" in cost else "",
        "\n".join(printable(f"{name:<{width}}{value}  {detail}".rstrip()) for name, value, detail in facts),
        "\n".join(printable(f"{name:<{width}}{place}") for name, place in places),
    ]
    return "\n\n".join(block for block in blocks if block)


def text_table(headers: Sequence[str], rows: Iterable[Sequence[str]], num_left: int = 1) -> str:
    """Plain columns: the first ``num_left`` to the left, the others to the right, a rule below the headers."""
    lines = [[printable(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    lines.insert(1, ["-" * width for width in widths])
    sides = ["<" if column < num_left else ">" for column in range(len(headers))]
    return "\n".join("  ".join(map("{:{}{}}".format, line, sides, widths)).rstrip() for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    """A figure for a table; very large perplexities in powers of ten, a missing one as a dash."""
    if value is None:
        return ABSENT
    return f"{value:.{digits}e}" if abs(value) >= 1e5 else f"{value:,.{digits}f}"


def percent(share: float | None, stderr: float | None = None) -> str:
    """A share in percent, with its standard error where there is one."""
    if share is None:
        return ABSENT
    return f"{100 * share:.1f} %" if stderr is None else f"{100 * share:.1f} ± {100 * stderr:.1f} %"


def _title(record: Mapping[str, Any], compression: Mapping[str, Any] | None) -> str:
    what = (
        f"{record['model']['name']}, dense"
        if compression is None
        else f"{record['model']['name']} by {compression['method']}"
    )
    if compression is not None:
        achieved, target = compression["achieved_sparsity"], compression["target_sparsity"]
        what += f": {100 * achieved:.2f} % of the block-linear weights removed ({100 * target:g} % asked)"
    limited = (
        "\nLIMITED: scored on a part of the test sets only, not comparable" if record["metrics"]["limited"] else ""
    )
    warnings = (compression or {}).get("warnings", [])  # older records have none
    return what + limited + "".join(f"\nWARNING: {warning}" for warning in warnings)


def _label(score: Score) -> str:
    return score.label if score.metric in ("perplexity", MEAN) else f"{score.label} ({score.metric})"


def _cells(score: Score) -> tuple[str, str, str]:
    if score.is_accuracy:
        dense = percent(score.dense, score.dense_stderr)
        return (
            dense,
            percent(score.compressed, score.compressed_stderr),
            percent(score.retention, score.retention_stderr),
        )
    ratio = ABSENT if score.compressed is None or not score.dense else f"x {number(score.compressed / score.dense)}"
    return number(score.dense), number(score.compressed), ratio


def _speed_rows(throughput: Mapping[str, Any] | None) -> list[tuple[str, str, str, str]]:
    """Tokens a second by workload; ``kept`` is the speed-up, and what the sizes would allow."""
    rows: dict[str, list[str]] = {}
    for each in throughput["measurements"] if throughput else ():
        label = f"{each['phase']} {each['batch_size']} x {each['length']} (tokens/s)"
        rows.setdefault(label, []).append(number(each["tokens_per_second"], 0))
        if each["model"] != "dense":
            rows[label].append(f"x {number(each['speedup'])} of x {number(each['ideal_speedup'])}")
    return [(label, cells[0], *(cells[1:] or (ABSENT, ABSENT))) for label, cells in rows.items()]


def _size_rows(record: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    model, compression = record["model"], record["compression"]
    counts = (
        ("parameters", model["num_parameters"], "whole_model_sparsity"),
        ("block-linear weights", model["block_linear_parameters"], "achieved_sparsity"),
    )
    rows = []
    for label, dense, sparsity in counts:
        kept = None if compression is None else 1 - compression[sparsity]
        rows.append((label, f"{dense:,}", ABSENT if kept is None else f"{round(kept * dense):,}", percent(kept)))
    return rows


def _before(scores: Iterable[Score]) -> str:
    """What training started from: perplexities, and the mean accuracy."""
    shown = [score for score in scores if score.before is not None and score.metric in ("perplexity", MEAN)]
    return (
        "from "
        + ", ".join(
            f"{score.name} {percent(score.before) if score.is_accuracy else number(score.before)}" for score in shown
        )
        if shown
        else ""
    )


def _stages(stages: Iterable[Mapping[str, Any]]) -> str:
    listed = list(stages)
    return "(" + ", ".join(f"{stage_name(stage, listed)} {stage['seconds']:.1f}" for stage in listed) + ")"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
