"""Text from a file, from the hub or from the package, as documents and as one stream of token ids.

The one loader of text: calibration and perplexity read through it, so both mean the same by a source's name.
"""

import gzip
import hashlib
import io
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modegpt.data.embedded import text_path
from modegpt.data.fingerprints import fingerprint_tokenizer
from modegpt.data.hub import commit_of, hub_access
from modegpt.errors import UserError

SPLITS = {"calibration": "train", "validation": "validation", "test": "test"}  # our names -> the hub's
SEPARATOR = "\n\n"
ALPACA_FIELDS = ("instruction", "input", "output")
REMEMBERED_STREAMS, REMEMBERED_TOKENS = 4, 2**24  # a sweep's jobs share a process, its calibration and its test text

Found = tuple[list[str], dict[str, str]]
"""Texts, and the commit of the hub's repository that they are from by its name; none for a file."""

_streams: dict[tuple[str, str, bool], Tensor] = {}  # by text, tokenizer and special tokens, the oldest first


@dataclass(frozen=True)
class Documents:
    """Texts in reading order. Every source is joined by a blank line, the field's rule for WikiText rows.

    ``commits``: of the hub's repository that they are from, by its name (``datasets/OWNER/NAME``).
    """

    source: str
    texts: tuple[str, ...]
    commits: Mapping[str, str] = dataclass_field(default_factory=dict)

    def joined(self) -> str:
        """All documents as one text."""
        return SEPARATOR.join(self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)


def load_documents(source: str, *, path: str | None, split: str, max_documents: int | None = None) -> Documents:
    """Read the documents of ``source``.

    ========== ============================================ ==================================================
    source     from the hub, or the package                 from ``path``
    ========== ============================================ ==================================================
    tiny       the embedded corpus                          (takes no path)
    wikitext2  Salesforce/wikitext, wikitext-2-raw-v1       raw text file, or a folder of ``wiki.<split>*`` files
    alpaca     tatsu-lab/alpaca (it has a train split only) json(l) of instruction, input, output
    c4         allenai/c4, first English shard              json(l) with ``text``
    jsonl      (needs a path)                               json(l) with ``text``
    text       (needs a path)                               any UTF-8 text file, one document
    ========== ============================================ ==================================================

    A document of WikiText-2 is a row of the hub's data set: a line with its newline, or ``""`` for a blank line.
    A document of Alpaca is instruction, input and output on successive lines, without those that are empty.
    A path may end in ``.gz``.

    Args:
        split: ``"calibration"``, ``"validation"`` or ``"test"``. A path that names a file is read whole, whatever the
            split.
        max_documents: read no more than this many; None reads all.

    Raises UserError on an unknown source, a missing or unreadable path, a row without its field (the line is named),
    no text at all, and a hub that cannot be reached.
    """
    assert split in SPLITS, split
    if source not in SOURCES:
        raise UserError(f"unknown text source {source!r}; choose one of {', '.join(SOURCES)}")
    read, commits = SOURCES[source](path, split, max_documents)
    texts = tuple(read)[:max_documents]
    if not any(text.strip() for text in texts):
        raise UserError(f"no text in {path or source}: every document is empty")
    return Documents(source=source, texts=texts, commits=commits)


def tokenize_stream(documents: Documents, tokenizer: Any, *, special_tokens: bool = True) -> Tensor:
    """Join ``documents`` and tokenise them once, as one stream.

    The tokenizer adds its special tokens as it does by default: with most tokenizers a single BOS at the very start.
    Without ``special_tokens`` it adds none. The last few streams are remembered for as long as the process lives.

    Returns (num_tokens,) int64 token ids.
    """
    text = documents.joined()
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    key = (digest, fingerprint_tokenizer(tokenizer), special_tokens)
    if key in _streams:
        return _streams[key].clone()
    # verbose=False: a stream is longer than any model's context, and saying so would alarm for nothing
    options = {"return_attention_mask": False, "verbose": False, "add_special_tokens": special_tokens}
    ids = tokenizer(text, **options)["input_ids"]
    stream = torch.tensor(ids, dtype=torch.int64)
    if stream.numel() <= REMEMBERED_TOKENS:
        for oldest in list(_streams)[: max(0, len(_streams) + 1 - REMEMBERED_STREAMS)]:
            del _streams[oldest]
        _streams[key] = stream.clone()
    return stream


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, unpacked when its name ends in ``.gz``; every line ends in a line feed alone.

    A byte order mark at its start is no part of the text. Raises UserError when it cannot be read.
    """
    opener: Callable[..., Any] = gzip.open if str(path).endswith(".gz") else open
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise UserError(f"cannot read {path}: it is a pipe or a device, not a file")  # it could wait for ever
        with opener(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def read_rows(path: str | Path, *, max_rows: int | None = None) -> list[tuple[str, dict]]:
    """Rows of a JSON-lines file, or of a JSON file that is one list.

    Each comes with its place (``"FILE, line 7"``) for messages.
    Raises UserError when the file cannot be read or a row is not a JSON object.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        places = ((f"{path}, item {index}", row) for index, row in enumerate(_parse_json(text, str(path)), start=1))
    else:
        lines = (
            (f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()
        )
        places = ((place, _parse_json(line, place)) for place, line in lines)
    rows: list[tuple[str, dict]] = []
    for place, row in places:
        if max_rows is not None and len(rows) == max_rows:
            break
        if not isinstance(row, dict):
            raise UserError(f"{place} is not a JSON object")
        rows.append((place, row))
    return rows


def field(row: dict, name: str, place: str, kind: type = str, *others: type) -> Any:
    """``row[name]``, checked to be a ``kind`` or one of ``others``. Raises UserError naming ``place`` otherwise."""
    if name not in row:
        raise UserError(f"{place} has no field {name!r}; it has {', '.join(map(repr, row)) or 'none'}")
    kinds = (kind, *others)
    if not isinstance(row[name], kinds):
        expected = " or ".join(each.__name__ for each in kinds)
        raise UserError(f"{place}: field {name!r} is {type(row[name]).__name__}, not {expected}")
    return row[name]


def _parse_json(text: str, place: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not valid JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{place} is not a row of text: it is nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{place} holds half of a character (a lone surrogate, \\ud800 to \\udfff)") from None
    return value


def _hub_rows(
    repository: str, split: str, source: str, max_documents: int | None, **kwargs: Any
) -> tuple[Sequence[dict], dict[str, str]]:
    """Rows from the hub, and the commit of their repository by its name."""
    import datasets

    with hub_access(
        repository,
        f"give a local copy: calibration={source} calibration.path=FILE (or evaluation.perplexity.path=FILE)",
    ):
        rows = datasets.load_dataset(repository, split=split, **kwargs)
    commit = commit_of(rows)
    commits = {} if commit is None else {f"datasets/{repository}": commit}
    return rows if max_documents is None else rows.select(range(min(max_documents, len(rows)))), commits


def _need_path(path: str | None, source: str) -> str:
    if path is None:
        raise UserError(f"text source {source!r} needs a file: set path=FILE beside it")
    return path


def _tiny(path: str | None, split: str, max_documents: int | None) -> Found:
    if path is not None:
        raise UserError(f"text source 'tiny' is embedded and takes no path; to read {path} use jsonl or text")
    return _jsonl(str(text_path(SPLITS[split])), split, max_documents)


def _wikitext2(path: str | None, split: str, max_documents: int | None) -> Found:
    if path is None:
        rows, commits = _hub_rows(
            "Salesforce/wikitext", SPLITS[split], "wikitext2", max_documents, name="wikitext-2-raw-v1"
        )
        return [row["text"] for row in rows], commits
    if os.path.isdir(path):
        pattern = {"calibration": "wiki.train*", "validation": "wiki.valid*", "test": "wiki.test*"}[split]
        path = str(only_file(path, pattern))
    # the hub's rows: lines keep their newline, blank ones are empty
    return [line if line.strip() else "" for line in io.StringIO(read_text(path))], {}


def _alpaca(path: str | None, split: str, max_documents: int | None) -> Found:
    commits: dict[str, str] = {}
    if path is None:
        if split != "calibration":
            raise UserError(f"alpaca has no {split} split on the hub; give a file of your own with path=FILE")
        hub_rows, commits = _hub_rows("tatsu-lab/alpaca", "train", "alpaca", max_documents)
        rows = [(f"tatsu-lab/alpaca, row {index}", row) for index, row in enumerate(hub_rows)]
    else:
        rows = read_rows(path, max_rows=max_documents)
    parts = (
        (field(row, name, place) if row.get(name) or name != "input" else "" for name in ALPACA_FIELDS)
        for place, row in rows
    )
    return ["\n".join(part for part in row if part) for row in parts], commits


def _c4(path: str | None, split: str, max_documents: int | None) -> Found:
    if path is not None:
        return _jsonl(path, split, max_documents)
    shard = (
        "en/c4-train.00000-of-01024.json.gz" if split == "calibration" else "en/c4-validation.00000-of-00008.json.gz"
    )
    rows, commits = _hub_rows("allenai/c4", "train", "c4", max_documents, data_files={"train": shard})
    return [row["text"] for row in rows], commits


def _jsonl(path: str | None, split: str, max_documents: int | None) -> Found:
    rows = read_rows(_need_path(path, "jsonl"), max_rows=max_documents)
    return [field(row, "text", place) for place, row in rows], {}


def _text(path: str | None, split: str, max_documents: int | None) -> Found:
    return [read_text(_need_path(path, "text"))], {}


def only_file(folder: str | Path, pattern: str) -> Path:
    """The one file in ``folder`` whose name matches ``pattern``. Raises UserError when there is none, or several."""
    found = sorted(entry for entry in Path(folder).glob(pattern) if entry.is_file())
    if len(found) != 1:
        raise UserError(
            f"{folder} should hold one file named {pattern}, but has {', '.join(file.name for file in found) or 'none'}"
        )
    return found[0]


SOURCES: dict[str, Callable[[str | None, str, int | None], Found]] = {
    "tiny": _tiny,
    "wikitext2": _wikitext2,
    "alpaca": _alpaca,
    "c4": _c4,
    "jsonl": _jsonl,
    "text": _text,
}
