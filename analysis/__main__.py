"""``python -m analysis``: every table, figure and the report, from the records under a results folder."""

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from analysis import gpu, orderings, page
from analysis.claims import claims
from analysis.expected import experiment, screen
from analysis.figures import Panel, draw, fingerprint, panels, save, save_small
from analysis.formats import latex, markdown, tidy_csv
from analysis.published import Beside, beside
from analysis.readme import SHOWN, readme
from analysis.runs import Run, damaged, read_runs
from analysis.specs import COMPARED, FIGURES, PARTS, TABLES, folders
from analysis.tables import Table, build
from analysis.throughput import FILE, blocks_of, throughput
from modegpt.errors import UserError
from modegpt.escaping import printable, spreadsheet

BUILT = ("tables", "figures", "report.html")
FRONT_PAGE = ("README.md", "figures")


def paper(results: Path, output: Path) -> dict[str, int]:
    """Write ``tables/``, ``figures/`` and ``report.html`` under ``output``, and the front page into ``results``.

    The front page is ``README.md`` and the pictures it shows, in ``figures/``. An earlier build is replaced once the
    new one is whole. Returns how many records, tables and figures there are. A broken record is listed and
    left out.
    """
    whole, broken = read_runs(results)
    runs, refused = screen(whole)
    refused = [*broken, *refused, *damaged(results, results / FILE, blocks_of)]
    for path in sorted((results / gpu.FOLDER).glob("*/*.json")):
        refused += damaged(results, path, gpu.parts_of)
    tables = {part.name: [table for spec in part.tables for table in build(spec, runs)] for part in PARTS}
    tables["cost"] += [*throughput(results), *gpu.compression(results)]
    built = {table.name: table for each in tables.values() for table in each}
    drawn = {spec.name: found for spec in FIGURES if (found := panels(spec, runs))}
    judged = claims(runs, results)
    orders = orderings.orderings(runs)
    published = [
        (name, title, beside(folders(experiments, runs), wanted)) for name, title, experiments, wanted in COMPARED
    ]
    output.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=output, prefix=".new-") as folder,
        tempfile.TemporaryDirectory(dir=results, prefix=".new-") as beside_records,
    ):
        new, front = Path(folder), Path(beside_records)
        for place in (new / "tables", new / "figures", front / "figures"):
            place.mkdir(parents=True)
        _write_tables(new / "tables", list(built.values()), orders, published)
        _draw_figures(new / "figures", drawn)
        for spec in SHOWN:
            if spec.name in drawn:
                name = f"{spec.name}.png"
                save_small(new / "figures" / name, front / "figures" / name, fingerprint(spec, drawn[spec.name]))
        (front / "README.md").write_text(readme(runs, judged, built, drawn), encoding="utf-8")
        chapters = [
            page.Chapter("Claims", (page.judged(judged),)),
            *(
                page.Chapter(
                    part.title,
                    (
                        *map(page.table, tables[part.name]),
                        *(
                            page.picture(spec.name, spec.title, new / "figures" / f"{spec.name}.png")
                            for spec in part.figures
                            if spec.name in drawn
                        ),
                    ),
                )
                for part in PARTS
            ),
            page.Chapter(
                "Published beside ours", (*(page.compared(*each) for each in published), page.ordered(orders))
            ),
            page.Chapter("Records", (page.absent(_absent(runs)), page.left_out(refused), page.origin(runs))),
        ]
        (new / "report.html").write_text(page.page(chapters, runs), encoding="utf-8")
        _replace(new, output, BUILT)
        _replace(front, results, FRONT_PAGE)
    return {"records": len(runs), "left out": len(refused), "tables": len(built), "figures": len(drawn)}


def _write_tables(
    place: Path,
    tables: Sequence[Table],
    orders: Sequence[orderings.Ordering],
    published: Sequence[tuple[str, str, Sequence[Beside]]],
) -> None:
    for table in tables:
        for suffix, text in ((".md", markdown(table)), (".tex", latex(table)), (".csv", tidy_csv(table))):
            (place / f"{table.name}{suffix}").write_text(text, encoding="utf-8")
    (place / "published_orderings.md").write_text(orderings.markdown(orders), encoding="utf-8")
    (place / "published_orderings.csv").write_text(orderings.tidy_csv(orders), encoding="utf-8")
    for name, _, rows in published:
        with (place / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*vars(rows[0].published), "ours", "difference", "records"])
            for each in rows:
                ours = [each.ours.mean, each.difference, " ".join(each.ours.records)]
                writer.writerow(map(spreadsheet, [*vars(each.published).values(), *ours]))


def _draw_figures(place: Path, drawn: Mapping[str, Sequence[Panel]]) -> None:
    for spec in FIGURES:
        if spec.name in drawn:
            save(draw(spec, drawn[spec.name]), place / spec.name)


def _absent(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The declared tables and figures whose experiments have no record, with the commands that make them."""
    begun = {run.facts["experiment"] for run in runs}
    declared = [(spec.title, spec.experiments) for spec in TABLES] + [
        (spec.title, spec.experiments) for spec in FIGURES
    ]
    return [
        (title, f"modegpt --multirun +experiments={name} model=MODEL")
        for title, experiments in declared
        for name in experiments
        if experiment(name).folder not in begun
    ]


def _replace(new: Path, place: Path, names: Sequence[str]) -> None:
    """Put the files and folders ``names`` of ``new`` in the place of those of an earlier build.

    Both are on one file system. Nothing old is deleted before all that is new is in its place.
    """
    with tempfile.TemporaryDirectory(dir=place, prefix=".old-") as folder:
        for name in names:
            old = Path(folder) / name
            if os.path.lexists(place / name):
                (place / name).rename(old)
            try:
                (new / name).rename(place / name)
            except OSError:
                if os.path.lexists(old):
                    old.rename(place / name)
                raise


def main(argv: Sequence[str] | None = None) -> int:
    """Build the report; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(prog="python -m analysis", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--results", type=Path, default=Path("results"), help="the store (default: results)")
    parser.add_argument("--output", type=Path, help="default: paper/ in the store")
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.results / "paper"
    started = time.monotonic()
    try:
        counts = paper(arguments.results, output)
    except (UserError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    print(
        ", ".join(f"{count} {name}" for name, count in counts.items())
        + f" in {time.monotonic() - started:.1f} s: {output / 'report.html'}, {arguments.results / 'README.md'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
