"""``modegpt-records``: look at, compare, check, export and pack what is in the store."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from modegpt.errors import UserError, any_terminal
from modegpt.escaping import printable, spreadsheet
from modegpt.files import replacing
from modegpt.records.archive import SUFFIX
from modegpt.records.packing import pack, unpack
from modegpt.records.schema import Record, flatten
from modegpt.records.scores import Score, accuracies, all_scores, difference_stderr, perplexities
from modegpt.records.store import RECORD, Entry, RecordStore
from modegpt.records.summary import ABSENT, number, percent, summary, text_table

SOME_DIGITS = re.compile(r"[0-9a-f]{4,64}")
Command = Callable[[RecordStore, argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 0, 1 if ``verify`` found something, 2 for a mistake of the user."""
    arguments = _parser().parse_args(argv)
    any_terminal()
    command: Command = arguments.command
    try:
        return command(RecordStore(arguments.root), arguments)
    except UserError as error:
        print(printable(f"modegpt-records: error: {error}"), file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough; keep Python from complaining when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="modegpt-records", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--root", default="results", help="the store (default: results)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, help: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=help, description=help)
        subparser.set_defaults(command=command)
        return subparser

    which = (
        f"a record: its hash (the first digits will do), its name, its directory or file, or EXPERIMENT{SUFFIX}#HASH"
    )
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
    add("pack", _pack, f"move finished records into ROOT/EXPERIMENT{SUFFIX}, the file to commit").add_argument(
        "experiments", nargs="*", metavar="experiment", help="default: every one that has records in directories"
    )
    add("unpack", _unpack, "write an archive's records back into their directories").add_argument(
        "experiments", nargs="+", metavar="experiment"
    )
    return parser


def _list(store: RecordStore, arguments: argparse.Namespace) -> int:
    lines, left_out = store.survey(lambda _, record: _line(record), arguments.experiment)
    failed = [note for note in store.errors() if arguments.experiment in (None, note["experiment"])]
    if lines:
        headers = ["hash", "experiment", "name", "model", "method", "sparsity", "perplexity", "zero-shot"]
        print(text_table(headers, lines, num_left=5))
    print(f"{len(lines)} finished, {len(failed)} failed" + (f", {len(left_out)} left out" if left_out else ""))
    for note in failed:
        print(printable(f"failed: {note['experiment']}/{note['name']} at {note['stage']}: {note['message']}"))
    _say_left_out(left_out)
    return 0


def _say_left_out(problems: Iterable[str]) -> None:
    for problem in problems:
        print(printable(f"left out: {problem}"))


def _line(record: Record) -> list[str]:
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
        number(first.final if first else None),
        percent(mean.final if mean else None),
    ]


def _show(store: RecordStore, arguments: argparse.Namespace) -> int:
    entry = _resolve(store, arguments.record)
    record = entry.load()
    if arguments.json:
        text = json.dumps(record, indent=2, ensure_ascii=False)
        print("".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text))
    else:
        print(summary(record, record_path=entry.path, pictures=sorted(entry.directory.glob("*.png"))))
        print(f"\n{printable(record['command'])}")
    return 0


def _compare(store: RecordStore, arguments: argparse.Namespace) -> int:
    entries = [_resolve(store, reference) for reference in arguments.records]
    if len({entry.path for entry in entries}) < 2:
        raise UserError("compare needs two different records")
    records = [entry.load() for entry in entries]
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
    name: str, first: dict[str, Score], other: dict[str, Score], first_record: Record, record: Record
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
        print(printable(problem))
    num_records = len(store.paths())
    print(f"{num_records} records, " + (f"{len(problems)} problems" if problems else "all whole and unchanged"))
    return 1 if problems else 0


def _export(store: RecordStore, arguments: argparse.Namespace) -> int:
    from modegpt.records.frame import tabulated  # pandas takes a second to import; the other commands do without

    frame, left_out = tabulated(store.root)
    path = arguments.csv or arguments.parquet
    try:
        with replacing(path) as temporary:
            if arguments.csv:
                frame.map(spreadsheet).to_csv(temporary, index=False)
            else:
                frame.to_parquet(temporary, index=False)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:  # a column of several types
        raise UserError(f"cannot write {path}: {error}; --csv takes any value") from error
    print(f"{len(frame)} records, {len(frame.columns)} columns: {path}")
    _say_left_out(left_out)
    return 0


def _pack(store: RecordStore, arguments: argparse.Namespace) -> int:
    experiments = arguments.experiments or [name for name in store.experiments() if any(store.entries_loose(name))]
    for experiment in experiments:
        num_moved = pack(store, experiment)
        archive = store.archive(experiment)
        print(f"{archive.path}: {len(archive.lines)} records, {num_moved} of them from directories")
    if not experiments:
        print(f"no record under {store.root} is in a directory: nothing to pack")
    return 0


def _unpack(store: RecordStore, arguments: argparse.Namespace) -> int:
    for experiment in arguments.experiments:
        print(f"{store.root / experiment}: {unpack(store, experiment)} records")
    return 0


def _resolve(store: RecordStore, reference: str) -> Entry:
    """The record that ``reference`` means. Raises UserError if none or several."""
    if f"{SUFFIX}#" in reference:
        return Entry.at(Path(reference))
    with suppress(OSError):  # what is too long for a path may still be a name
        for path in (Path(reference), Path(reference) / RECORD):
            if path.name == RECORD and path.is_file():
                return Entry.at(path)
    by_hash = store.find(reference) if SOME_DIGITS.fullmatch(reference) else []
    found = by_hash or [entry for entry in store.entries() if _is_called(entry, reference)]
    if not found:
        raise UserError(f"no record {reference!r} under {store.root}; `modegpt-records list` shows all")
    if len(found) > 1:
        places = ", ".join(str(entry.path) for entry in found[:3])
        raise UserError(f"{reference!r} means {len(found)} records: {places}; give more of the hash")
    return found[0]


def _is_called(entry: Entry, reference: str) -> bool:
    if entry.directory == Path(reference):
        return True
    try:
        stored = entry.stored()
    except UserError:  # another record's damage
        return False
    return isinstance(stored, dict) and stored.get("name") == reference


if __name__ == "__main__":
    sys.exit(main())
