"""What ``benchmarks/gpu.py`` measured on a GPU: seconds of a compression, and the speed of what it leaves."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.cells import Cell, Column
from analysis.runs import Refusal
from analysis.tables import Row, Table
from modegpt.errors import UserError
from modegpt.files import read_json
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
    """One measurement: its file below the results, GPU and time, name, what was found or None, and the ``status``."""

    file: str
    where: str
    name: str
    found: Mapping[str, Any] | None
    status: str


def gpu_parts(results: Path, step: str) -> list[Part]:
    """What was measured in a step, oldest first; damaged files are left out."""
    found: list[Part] = []
    for path in sorted((results / FOLDER).glob(f"*/{step}.json")):
        with suppress(UserError):
            found += _read(results, path)
    return found


def damaged(results: Path) -> list[Refusal]:
    """The files that are left out."""
    refused = []
    for path in sorted((results / FOLDER).glob("*/*.json")):
        try:
            _read(results, path)
        except UserError as error:
            refused.append(Refusal(path.relative_to(results).as_posix(), str(error).removeprefix(f"{path}: ")))
    return refused


def _read(results: Path, path: Path) -> list[Part]:
    record, file = read_json(path), path.relative_to(results).as_posix()
    with explained(path):
        where = f"{record['provenance']['hardware']['gpus'][0]['name']}, {path.parent.name}"
        return [
            Part(file, where, part["name"], part.get("result"), f"{part['status']}: {part.get('reason')}")
            for part in record.get("parts", ())
        ]


def compression(results: Path) -> list[Table]:
    """Seconds of compressing models of true shape; empty where nothing was measured."""
    blocks: dict[str, list[Row]] = {}
    for part in gpu_parts(results, "cost"):
        blocks.setdefault(part.where, []).append(_row(part))
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


def peak_gpu_bytes(found: Mapping[str, Any]) -> int:
    """Of a measurement on one GPU."""
    [peak] = (size for device, size in found["peak_memory_bytes"].items() if device != "host")
    return int(peak)


def _row(part: Part) -> Row:
    if part.found is None:
        cells = (Cell(records=(part.file,), refused=part.status), *(Cell(),) * (len(COLUMNS) - 1))
    else:
        whole = part.found.get("extrapolated_seconds", part.found["seconds"])
        values = {**part.found, "whole": whole, "peak_gpu_memory_bytes": peak_gpu_bytes(part.found)}
        cells = tuple(
            Cell((column.scale * values[column.metric],), (part.file,)) if column.metric in values else Cell()
            for column in COLUMNS
        )
    return Row((part.name,), cells, ("",) * len(cells))
