"""What ``benchmarks/gpu.py`` measured on a GPU: seconds of a compression, and the speed of what it leaves."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.cells import Cell, Column
from analysis.tables import Row, Table, measured_row
from modegpt.errors import UserError
from modegpt.files import read_json
from modegpt.records.frame import peak_gpu_bytes
from modegpt.records.store import explained

FOLDER = "gpu"
COLUMNS = (
    Column("Seconds", "seconds", digits=1),
    Column("Times its floor", "ratio"),
    Column("Whole model (s)", "whole", digits=0),
    Column("Goal (s)", "goal_seconds", digits=0),
    Column("Peak GPU memory (GiB)", "peak_gpu_memory_bytes", scale=2**-30, digits=1),
)


@dataclass(frozen=True)
class Part:
    """One measurement: its file below the results, the GPU, its name, and what was found or why nothing was.

    ``found`` is empty where it failed or was skipped.
    """

    file: str
    gpu: str
    name: str
    found: Mapping[str, Any]
    failure: str


def gpu_parts(results: Path, step: str) -> list[Part]:
    """What was measured in a step, oldest first; damaged files are left out."""
    found: list[Part] = []
    for path in sorted((results / FOLDER).glob(f"*/{step}.json")):
        with suppress(UserError):
            found += parts_of(path)
    return found


def parts_of(path: Path) -> list[Part]:
    """Those of one record; raises UserError where it is damaged."""
    record, file = read_json(path), f"{FOLDER}/{path.parent.name}/{path.name}"
    with explained(path):
        gpu = record["provenance"]["hardware"]["gpus"][0]["name"]
        return [
            Part(file, gpu, part["name"], part.get("result", {}), f"{part['status']}: {part.get('reason')}")
            for part in record.get("parts", ())
        ]


def compression(results: Path) -> list[Table]:
    """Seconds of compressing models of true shape; empty where nothing was measured."""
    blocks: dict[str, list[Row]] = {}
    for part in gpu_parts(results, "cost"):
        blocks.setdefault(f"{part.gpu}, {Path(part.file).parent.name}", []).append(_row(part))
    if not blocks:
        return []
    return [
        Table(
            name="gpu_compression",
            title="Compressing models of true shape on a GPU",
            headings=("Model, allocation",),
            columns=COLUMNS,
            blocks=tuple((heading, tuple(rows)) for heading, rows in blocks.items()),
            notes=(
                "30 % removed, 128 windows of 2048 tokens, random weights in bfloat16 that are on the GPU already. Of "
                "a model that is measured by some of its layers, the whole is those seconds times its layers. The "
                "floor: FLOPs and bytes at the rates measured on that GPU.",
            ),
            missing=(),
        )
    ]


def _row(part: Part) -> Row:
    if not part.found:
        cells = (Cell(records=(part.file,), refused=part.failure), *(Cell(),) * (len(COLUMNS) - 1))
        return Row((part.name,), cells, ("",) * len(cells))
    whole = part.found.get("extrapolated_seconds", part.found["seconds"])
    peak = peak_gpu_bytes(part.found["peak_memory_bytes"])
    return measured_row((part.name,), COLUMNS, {**part.found, "whole": whole, "peak_gpu_memory_bytes": peak}, part.file)
