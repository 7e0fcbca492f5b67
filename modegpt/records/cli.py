"""``modegpt-records``: look at, compare, check and export what is in the store."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modegpt.errors import UserError
from modegpt.records.schema import flatten
from modegpt.records.scores import Score, accuracies, all_scores, difference_stderr, perplexities
from modegpt.records.store import RECORD, RecordStore, load_record
from modegpt.records.summary import ABSENT, number, percent, summary, text_table

MIN_PREFIX = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 0, 1 if ``verify`` found something, 2 for a mistake of the user."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(RecordStore(arguments.root), arguments)
    except UserError as error:
        print(f"modegpt-records: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough; keep Python from complaining when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="modegpt-records", description=__doc__.partition(": ")[2])
    parser.add_argument("--root", default="results", help="the store (default: results)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, help: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=help, description=help)
        subparser.set_defaults(command=command)
        return subparser

    which = "a record: its hash (the first digits will do), its name, its directory or its file"
    add("list", _list, "one line a record, and the runs that failed").add_argument(
        "--experiment", help="only this experiment"
    )
    show = add("show", _show, "one record as a table")
    show.add_argument("record", help=which)
    show.add_argument("--json", action="store_true", help="the record itself")
    add("compare", _compare, "where configurations differ, and the scores side by side").add_argument(
        "records", nargs="+", metavar="record", help=f"two or more; {which}"
    )
    add("verify", _verify, "check that every record is whole, unchanged and in its place")
    export = add("export", _export, "the whole store as one table, a row a record")
    formats = export.add_mutually_exclusive_group(required=True)
    formats.add_argument("--csv", type=Path, metavar="FILE")
    formats.add_argument("--parquet", type=Path, metavar="FILE")
    return parser


def _list(store: RecordStore, arguments: argparse.Namespace) -> int:
    records = [load_record(path) for path in store.paths()]
    failed = store.errors()
    if arguments.experiment is not None:
        records, failed = (
            [each for each in of if each["experiment"] == arguments.experiment] for of in (records, failed)
        )
    if records:
        headers = ["hash", "experiment", "name", "model", "method", "sparsity", "perplexity", "zero-shot"]
        print(text_table(headers, map(_line, records), num_left=5))
    print(f"{len(records)} finished, {len(failed)} failed")
    for note in failed:
        print(f"failed: {note['experiment']}/{note['name']} at {note['stage']}: {note['message']}")
    return 0


def _line(record: dict) -> list[str]:
    compression = record["compression"] or {"method": "dense", "achieved_sparsity": 0.0}
    first = next(iter(perplexities(record)), None)
    mean = next((score for score in accuracies(record) if score.name == "zeroshot_mean"), None)
    return [
        record["identity"]["hash"][:8],
        record["experiment"],
        record["name"],
        record["model"]["name"],
        compression["method"],
        percent(compression["achieved_sparsity"]),
        number(first and first.final),
        percent(mean and mean.final),
    ]


def _show(store: RecordStore, arguments: argparse.Namespace) -> int:
    path = _resolve(store, arguments.record)
    record = load_record(path)
    if arguments.json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        print(summary(record, record_path=path, pictures=sorted(path.parent.glob("*.png"))))
        print(f"\n{record['command']}")
    return 0


def _compare(store: RecordStore, arguments: argparse.Namespace) -> int:
    paths = [_resolve(store, reference) for reference in arguments.records]
    if len(set(paths)) < 2:
        raise UserError("compare needs two different records")
    records = [load_record(path) for path in paths]
    heads = [f"{record['name']} {record['identity']['hash'][:8]}" for record in records]
    settings = [flatten({key: record[key] for key in ("config", "seeds")}) for record in records]
    keys = dict.fromkeys(key for setting in settings for key in setting)
    differing = [key for key in keys if any(setting.get(key) != settings[0].get(key) for setting in settings[1:])]
    if differing:
        print(
            text_table(
                ["setting", *heads],
                [[key, *(str(setting.get(key, ABSENT)) for setting in settings)] for key in differing],
            )
        )
    else:
        print("the configurations are equal")

    columns = [{score.name: score for score in all_scores(record)} for record in records]
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        present = [column.get(name) for column in columns]
        rows.append([name, *(_pair(score) if score else ABSENT for score in present)])
        if any(score and score.is_accuracy for score in present):
            rows.append(
                [
                    "  over the first (points)",
                    ABSENT,
                    *(
                        _over_the_first(name, columns[0], column, records[0], record)
                        for column, record in zip(columns[1:], records[1:], strict=True)
                    ),
                ]
            )
    shares = [("removed, block-linear", "achieved_sparsity"), ("removed, whole model", "whole_model_sparsity")]
    rows += [[label, *(percent((record["compression"] or {}).get(key)) for record in records)] for label, key in shares]
    rows.append(
        ["seconds", *(number(sum(stage["seconds"] for stage in record["cost"]["stages"])) for record in records)]
    )
    print()
    print(text_table(["score", *heads], rows))
    return 0


def _pair(score: Score) -> str:
    show = percent if score.is_accuracy else number
    return f"{show(score.final)} (dense {show(score.dense)})"


def _over_the_first(
    name: str, first: dict[str, Score], other: dict[str, Score], first_record: dict, record: dict
) -> str:
    """A difference of accuracies in points; with a paired standard error where both were asked the same items."""
    if name not in first or name not in other:
        return ABSENT
    points = f"{100 * (other[name].final - first[name].final):+.1f}"
    stderr = difference_stderr(record, first_record, name)
    return points if stderr is None else f"{points} ± {100 * stderr:.1f}"


def _verify(store: RecordStore, arguments: argparse.Namespace) -> int:
    problems = store.problems()
    for problem in problems:
        print(problem)
    num_records = len(store.paths())
    print(f"{num_records} records, " + (f"{len(problems)} problems" if problems else "all whole and unchanged"))
    return 1 if problems else 0


def _export(store: RecordStore, arguments: argparse.Namespace) -> int:
    from modegpt.records.frame import load_records  # pandas takes a second to import; the other commands do without

    frame = load_records(store.root)
    path = arguments.csv or arguments.parquet
    try:
        frame.to_csv(path, index=False) if arguments.csv else frame.to_parquet(path, index=False)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    print(f"{len(frame)} records, {len(frame.columns)} columns: {path}")
    return 0


def _resolve(store: RecordStore, reference: str) -> Path:
    """The file of the record that ``reference`` means. Raises UserError if none or several."""
    for path in (Path(reference), Path(reference) / RECORD):
        if path.name == RECORD and path.is_file():
            return path
    found = [path for path in store.paths() if _matches(load_record(path), reference)]
    if not found:
        raise UserError(f"no record {reference!r} under {store.root}; `modegpt-records list` shows all")
    if len(found) > 1:
        places = ", ".join(str(path.parent) for path in found[:3])
        raise UserError(f"{reference!r} means {len(found)} records: {places}; give more of the hash")
    return found[0]


def _matches(record: dict, reference: str) -> bool:
    by_hash = len(reference) >= MIN_PREFIX and record["identity"]["hash"].startswith(reference)
    return by_hash or record["name"] == reference


if __name__ == "__main__":
    sys.exit(main())
