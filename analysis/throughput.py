"""Throughput and latency of dense and compressed models, from what ``benchmarks/bench_inference.py`` measured."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from analysis.cells import Column
from analysis.gpu import Part, gpu_parts
from analysis.tables import Row, Table, measured_row
from modegpt.errors import UserError
from modegpt.files import read_json
from modegpt.records.store import explained

FILE = "bench/inference.json"
HEADINGS = {"phase": "Phase", "batch_size": "Batch", "length": "Tokens", "model": "Model"}
COLUMNS = (
    Column("Tokens/s", "tokens_per_second"),
    Column("Latency (ms)", "latency_milliseconds", digits=1),
    Column("Speed-up", "speedup"),
    Column("Speed-up its sizes allow", "ideal_speedup"),
    Column("Share of that (%)", "share_of_ideal", scale=100, digits=0),
)


def throughput(results: Path) -> list[Table]:
    """The table of ``results/bench/inference.json`` and of what was measured on GPUs; none where nothing was, and
    without files that are damaged.
    """
    blocks: list[tuple[str, tuple[Row, ...]]] = []
    with suppress(UserError):
        blocks += blocks_of(results / FILE)
    blocks += [
        (_on_gpu(part), tuple(_row(each, part.file) for each in part.found["measurements"]))
        for part in gpu_parts(results, "inference")
        if part.found
    ]
    if not blocks:
        return []
    return [
        Table(
            name="throughput",
            title="Throughput and latency against rate",
            headings=tuple(HEADINGS.values()),
            columns=COLUMNS,
            blocks=tuple(blocks),
            notes=(
                "Latency: of a prefill, or of one more token of every sequence. "
                "The last columns set the speed-up beside what the sizes allow on that machine.",
            ),
            missing=(),
        )
    ]


def blocks_of(path: Path) -> list[tuple[str, tuple[Row, ...]]]:
    """Rows under their headings, of `FILE` at ``path``; raises UserError where it is damaged."""
    if not path.is_file():
        return []
    measured = read_json(path)
    with explained(path):
        return [
            (_heading(name, found, measured), tuple(_row(each, FILE) for each in found["measurements"]))
            for name, found in measured["compared"].items()
        ]


def _row(measured: Mapping[str, Any], file: str) -> Row:
    # a decoding step makes one token for every sequence of the batch, a prefill reads all of them at once
    tokens = measured["batch_size"] * (measured["length"] if measured["phase"] == "prefill" else 1)
    values = {**measured, "latency_milliseconds": 1000 * tokens / measured["tokens_per_second"]}
    return measured_row(tuple(str(measured[key]) for key in HEADINGS), COLUMNS, values, file)


def _heading(name: str, found: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    settings, hardware = measured["settings"], measured["provenance"]["hardware"]
    size = found["models"]["dense"]["num_parameters"] / 1e6
    where = (
        hardware["gpus"][0]["name"]
        if settings["device"] != "cpu" and hardware["gpus"]
        else f"{hardware['cpu']}, {settings['threads']} thread(s)"
    )
    seconds = {"wall": "", "processor": ", processor seconds"}[settings["clock"]]
    what = "random Llama" if name == "random" else name
    return f"{what} of {size:.0f}M parameters, {settings['dtype']}, {where}{seconds}"


def _on_gpu(part: Part) -> str:
    size, layers = part.found["models"]["dense"]["num_parameters"] / 1e6, part.found["layers"]
    cut = "" if layers == part.found["of_layers"] else f" ({layers} of {part.found['of_layers']} layers)"
    way = {"captured": "captured as CUDA graphs"}.get(way := part.name.partition(",")[0], way)
    return f"random Llama of {size:.0f}M parameters{cut}, bfloat16, {part.gpu}, {way}"
