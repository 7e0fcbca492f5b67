"""``python -m analysis``: every table, figure and the report, from the records under a results folder."""

import argparse
import csv
import shutil
import sys
import time
from pathlib import Path

from analysis import orderings
from analysis.expected import experiment
from analysis.figures import draw, save
from analysis.formats import latex, markdown, tidy_csv
from analysis.page import Picture, page
from analysis.published import Beside, beside
from analysis.runs import load_runs, screen
from analysis.specs import COMPARED, FIGURES, TABLES, folders
from analysis.tables import build
from analysis.throughput import throughput
from modegpt.errors import UserError


def paper(results: Path, output: Path) -> dict[str, int]:
    """Write ``tables/``, ``figures/`` and ``report.html`` under ``output``; returns how many there are of each.

    What an earlier build left there goes. Raises UserError for a broken record.
    """
    runs, refused = screen(load_runs(results))
    tables = [table for spec in TABLES for table in build(spec, runs)] + throughput(results)
    compared = [
        (name, title, beside(folders(experiments, runs), wanted)) for name, title, experiments, wanted in COMPARED
    ]
    for folder in ("tables", "figures"):
        shutil.rmtree(output / folder, ignore_errors=True)
        (output / folder).mkdir(parents=True)
    for table in tables:
        for suffix, form in ((".md", markdown), (".tex", latex), (".csv", tidy_csv)):
            (output / "tables" / f"{table.name}{suffix}").write_text(form(table), encoding="utf-8")
    for name, _, rows in compared:
        _write_compared(output / "tables" / f"{name}.csv", rows)
    orders = orderings.orderings(runs)
    for suffix, form in ((".md", orderings.markdown), (".csv", orderings.tidy_csv)):
        (output / "tables" / f"published_orderings{suffix}").write_text(form(orders), encoding="utf-8")
    pictures = []
    for spec in FIGURES:
        figure = draw(spec, runs)
        if figure is not None:
            png, _ = save(figure, output / "figures" / spec.name)
            pictures.append(Picture(spec.name, spec.title, png))
    begun = {run.facts["experiment"] for run in runs}
    absent = [
        (spec.title, f"modegpt --multirun +experiments={name} model=MODEL")
        for spec in (*TABLES, *FIGURES)
        for name in spec.experiments
        if experiment(name).folder not in begun
    ]
    document = page(
        tables=tables, pictures=pictures, compared=compared, orders=orders, absent=absent, runs=runs, refused=refused
    )
    (output / "report.html").write_text(document, encoding="utf-8")
    return {"records": len(runs), "left out": len(refused), "tables": len(tables), "figures": len(pictures)}


def _write_compared(path: Path, rows: list[Beside]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*vars(rows[0].published), "ours", "difference", "records"])
        for each in rows:
            writer.writerow(
                [*vars(each.published).values(), each.ours.mean, each.difference, " ".join(each.ours.records)]
            )


def main() -> int:
    """Build the report; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(prog="python -m analysis", description=__doc__.partition(": ")[2])
    parser.add_argument("--results", type=Path, default=Path("results"), help="the store (default: results)")
    parser.add_argument("--output", type=Path, help="default: paper/ in the store")
    arguments = parser.parse_args()
    output = arguments.output or arguments.results / "paper"
    started = time.monotonic()
    try:
        counts = paper(arguments.results, output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        ", ".join(f"{count} {name}" for name, count in counts.items())
        + f" in {time.monotonic() - started:.1f} s: {output / 'report.html'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
