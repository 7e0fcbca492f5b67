"""A seeded generator of bad input: command lines, configurations, checkpoints, texts, records and caches.

A case is what to type and the folder in which it is typed, with all the files that it is about. Damage is drawn, so a
case may turn out harmless: what is asserted of all of them is in ``test_fuzz.py``.
"""

import copy
import gzip
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from modegpt.cli.schema import config_directory, config_groups
from modegpt.config import RunConfig
from modegpt.records.store import RecordStore, content_hash, identity
from tests.records.sample import sample_record

SMALL = (
    "model=local",
    "model.path=model",
    "calibration=jsonl",
    "calibration.path=text.jsonl",
    "calibration.num_samples=2",
    "calibration.sequence_length=16",
    "calibration.batch_size=2",
    "evaluation=none",
    "tracking=disabled",
    "output.pictures=false",
    "output.root=results",
    "cache.dir=cache",
    "quiet=true",
)
"""A run of a tenth of a second, from the files of `furnish`."""
VALUES: tuple[Any, ...] = (
    *(
        "null",
        "-1",
        "0",
        "1",
        "1.5",
        "-0.0",
        "1e400",
        "inf",
        "-inf",
        "nan",
        "true",
        "''",
        "' '",
        "''''",
        "x",
        "x" * 3000,
    ),
    *(
        "[",
        "]",
        "{}",
        "{a:1}",
        "[]",
        "[[]]",
        "[1,2]",
        "[null]",
        "[true]",
        "[-1]",
        "[x,y]",
        "[1e309]",
        "1,2",
        "a=b",
        "=",
        "==",
    ),
    *(
        "18446744073709551616",
        "-9223372036854775809",
        "1" * 400,
        "0x10",
        "1_000",
        "'1'",
        "\0",
        "'a\0b'",
        "\udcff",
        "\x1b[2J",
    ),
    *(
        "${seed}",
        "${nothing.here}",
        "${oc.env:NOTHING_HERE}",
        "${",
        "???",
        "'???'",
        "$(touch ran)",
        "`touch ran`",
        "; touch ran",
    ),
    *(
        "..",
        "../..",
        ".",
        "/",
        "//",
        "text.jsonl",
        "text.jsonl/below",
        "precious",
        "model",
        "no/such/place",
        "embedded:none",
    ),
    *(
        "🙂",
        "é",
        "a\nb",
        "'a\\nb'",
        "\\",
        "'\\'",
        "%s",
        "{0}",
        "cuda",
        "cuda:9",
        "mps",
        "meta",
        "float8",
        "auto",
        "dense",
        "none",
    ),
)
"""What is given for an option."""
FLAGS = (
    "--nonsense",
    "--cfg",
    "--cfg=all",
    "--multirun=1",
    "-x",
    "--config-name=none",
    "--config-path=/",
    "--",
    "-",
    "--package",
)
JSON_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        7,
        1.5,
        -1e300,
        1e300,
        2**31,
        2**63,
        2**64,
        10**400,
        float("nan"),
        float("inf"),
    ),
    *("", " ", "x", "nonsense", "1", "float7", "\0", "\ud800", "\x1b[2J", "<b>", "a" * 5000, "llama", "opt"),
    *([], {}, [1], [None], {"a": 1}, {"": None}, [[]], [[[[]]]]),
)
"""What is put in the place of a member of a JSON file."""


@dataclass(frozen=True)
class Case:
    """``command``: its program and arguments, typed in a folder that ``prepare`` has damaged."""

    kind: str
    command: tuple[str, ...]
    prepare: Callable[[Path], None] = lambda folder: None
    what: str = ""

    def __str__(self) -> str:
        words = (
            (self.command[0], "...", *self.command[1 + len(SMALL) :])
            if set(SMALL) <= set(self.command)
            else self.command
        )
        return f"{' '.join(map(ascii, words))[:300]} {self.what}"


def furnish(folder: Path, model: Path) -> None:
    """The files that cases are about: a small model, text, two records, an archive, and what is not theirs."""
    shutil.copytree(model, folder / "model")
    lines = [json.dumps({"text": "w3 w4 w5 w6 w7 w8 " * 20, "instruction": "w3", "output": "w4"})] * 4
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "precious").mkdir()
    (folder / "precious" / "thesis.tex").write_text("years of work")
    store = RecordStore(folder / "results")
    store.write(sample_record())
    store.write(sample_record(seed=1))
    store.write(sample_record(seed=2) | {"experiment": "seeds"})


def cases(kind: str, seed: int, number: int) -> Iterator[Case]:
    """``number`` cases of one of `KINDS`, the same for the same seed."""
    for index in range(number):
        yield KINDS[kind](random.Random(f"{kind} {seed} {index}"))


def command_line(draw: random.Random) -> Case:
    """Options with wrong names and values, flags that are none, words that are no options."""
    options = _options()
    words = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        match draw.randrange(12):
            case 0:
                words.append(draw.choice(FLAGS))
            case 1:
                key = draw.choice(options)
                at = draw.randrange(len(key))
                words.append(f"{key[:at]}{draw.choice('xq./@ ')}{key[at + 1 :]}={draw.choice(VALUES)}")
            case 2 | 3:
                words.append(f"{draw.choice(('', '+', '++', '~'))}{draw.choice(config_groups())}={draw.choice(VALUES)}")
            case 4:
                words.append(f"{draw.choice(('+', '++', '~'))}{draw.choice(options)}={draw.choice(VALUES)}")
            case 5:
                words.append(str(draw.choice(VALUES)))
            case 6:
                words.append(f"{draw.choice(_choices())}")
                words.append(f"{draw.choice(options)}={draw.choice(VALUES)}")
            case _:
                words.append(f"{draw.choice(options)}={draw.choice(VALUES)}")
    return Case("command line", ("modegpt", *SMALL, *words))


def other_command(draw: random.Random) -> Case:
    """The small commands and the analysis with arguments that they cannot use."""
    values = [str(value) for value in VALUES if not str(value).startswith("-") and "\udcff" not in str(value)]
    places = [*values, "model", "text.jsonl", "precious", "results", "model/config.json", "0" * 8, "demo"]
    one, other, third = (draw.choice(places) for _ in range(3))
    records = ("modegpt-records", "--root", draw.choice(("results", "results", one)))
    command = draw.choice(
        (
            ("modegpt-cut", one, draw.choice((other, "0.3", "1", "nan")), third),
            ("modegpt-cut", "model", other, third),
            ("modegpt-export", draw.choice((one, "model")), draw.choice((other, "precious"))),
            ("modegpt-export", "model", "out", "--width-multiple", other),
            (*records, "list", "--experiment", other),
            (*records, "show", other),
            (*records, "show", other, "--json"),
            (*records, "compare", other, third),
            (*records, "export", draw.choice(("--csv", "--parquet")), other),
            (*records, "pack", other),
            (*records, "unpack", other),
            (*records, other),
            ("analysis", "--results", one, "--output", other),
            ("analysis", "--results", "results", "--output", draw.choice((other, "text.jsonl", "text.jsonl/below"))),
            ("analysis", other),
        )
    )
    return Case("other command", command)


def config(draw: random.Random) -> Case:
    """A model's JSON files with members that are missing, of another type or out of range."""
    name = draw.choice(("config.json",) * 6 + ("tokenizer_config.json", "tokenizer.json", "generation_config.json"))
    changes = [(draw.random(), draw.random(), draw.choice(JSON_VALUES)) for _ in range(draw.choice((1, 1, 2)))]

    def prepare(folder: Path) -> None:
        path = folder / "model" / name
        content = json.loads(path.read_text())
        for where, what, value in changes:
            members = list(_members(content))
            node, key = members[int(where * len(members))]
            if what < 0.15:
                del node[key]
            else:
                node[key] = copy.deepcopy(value)
        path.write_text(json.dumps(content))

    return Case("config", _reads_model(draw), prepare, f"with {name} changed: {changes!r:.200}")


def checkpoint(draw: random.Random) -> Case:
    """A checkpoint with a file that is damaged, missing or something else."""
    name = draw.choice(
        ("model.safetensors",) * 6
        + (
            "config.json",
            "tokenizer.json",
            "model.safetensors.index.json",
            "modegpt_manifest.json",
            "pytorch_model.bin",
        )
    )
    damage = draw.choice((*DAMAGES, *((header,) * 3 if name == "model.safetensors" else ()), header))
    seed = draw.random()

    def prepare(folder: Path) -> None:
        path = folder / "model" / name
        if name == "pytorch_model.bin":
            (folder / "model" / "model.safetensors").rename(path)
        if not path.exists():
            path.write_text('{"weight_map": {}, "files": {}}')
        damage(path, random.Random(seed))

    return Case("checkpoint", _reads_model(draw), prepare, f"with {name} after {damage.__name__}")


def text(draw: random.Random) -> Case:
    """Texts that are no text, in every form that is read."""
    form = draw.choice(("jsonl", "text", "alpaca", "c4", "wikitext2"))
    name = draw.choice(("text.jsonl", "text.jsonl", "text.json", "text.gz", "text.jsonl.gz", "folder"))
    content = draw.choice(TEXTS)
    damage = draw.choice((*(each for each in DAMAGES if each is not huge), None, None, None, None))
    seed = draw.random()

    def prepare(folder: Path) -> None:
        path = folder / name
        if name == "folder":
            path.mkdir()
            path = path / draw.choice(("wiki.train.raw", "wiki.test.raw", "other"))
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") and seed < 0.7 else content)
        if damage is not None:
            damage(path, random.Random(seed))

    words: tuple[str, ...] = (f"calibration={form}", f"calibration.path={name}")
    if draw.random() >= 0.5:
        words = ("evaluation=text", f"evaluation.perplexity.source={form}", f"evaluation.perplexity.path={name}")
        words += ("evaluation.perplexity.windows=[16]", "evaluation.zeroshot=null")
    what = f"of {content[:60]!r} after {getattr(damage, '__name__', 'nothing')}"
    return Case("text", ("modegpt", *SMALL, *words), prepare, what)


def record(draw: random.Random) -> Case:
    """Records, notes of failures and archives that are damaged, under every command that reads them."""
    changes = [(draw.random(), draw.choice(JSON_VALUES)) for _ in range(draw.choice((1, 1, 3)))]
    form = draw.choice(("member", "member", "member", "member", "file", "note", "archive", "bench"))
    seal, damage, seed = draw.random() < 0.6, draw.choice(DAMAGES), draw.random()

    def prepare(folder: Path) -> None:
        store = RecordStore(folder / "results")
        path = store.paths()[0]
        if form == "member":
            content = json.loads(path.read_text())
            for where, value in changes:
                members = list(_members(content))
                node, key = members[int(where * len(members))]
                node[key] = copy.deepcopy(value)
            path.write_text(json.dumps(_sealed(content) if seal else content))
        elif form == "archive":
            path = folder / "results" / "demo.jsonl.gz"
            text = "\n".join(each.read_text().replace("\n", "") for each in store.paths()[:2])
            path.write_bytes(gzip.compress(text.encode()))
            damage(path, random.Random(seed))
        elif form == "note":
            path = path.parent.parent / "failed" / "error.json"
            path.parent.mkdir()
            path.write_text(json.dumps({"experiment": "demo", "name": changes[0][1], "stage": changes[-1][1]}))
        elif form == "bench":
            path = folder / "results" / "bench" / "inference.json"
            path.parent.mkdir()
            path.write_text(json.dumps({"compared": changes[0][1], "settings": changes[-1][1]}))
        else:
            damage(path, random.Random(seed))

    records = ("modegpt-records", "--root", "results")
    command = draw.choice(
        (
            *((*records, "list"), (*records, "verify"), (*records, "pack"), (*records, "unpack", "demo")),
            *((*records, "export", "--csv", "all.csv"), (*records, "export", "--parquet", "all.parquet")),
            *((*records, "show", "tiny-llama modegpt 0.3"), (*records, "compare", "results/demo", "tiny-llama")),
            *(("analysis", "--results", "results", "--output", "paper"),) * 4,
        )
    )
    what = (
        f"with {form} changed: {changes!r:.200}" if form in ("member", "note", "bench") else f"{form} {damage.__name__}"
    )
    return Case("record", command, prepare, what)


def cache(draw: random.Random) -> Case:
    """A second run over a cache and an output that something has damaged meanwhile."""
    damage, seed = draw.choice(DAMAGES), draw.random()
    command = ("modegpt", *SMALL, "calibration.seed=1", "compression.sparsity=0.4")

    def prepare(folder: Path) -> None:
        from tests.fuzz.test_fuzz import call  # which runs what is damaged here

        call(("modegpt", *SMALL, "calibration.seed=1"), folder)
        files = sorted(path for path in (folder / "cache").rglob("*") if path.is_file())
        for path in random.Random(seed).sample(files, min(3, len(files))):
            damage(path, random.Random(seed))

    return Case("cache", command, prepare, f"after {damage.__name__}")


KINDS: dict[str, Callable[[random.Random], Case]] = {
    "command line": command_line,
    "other command": other_command,
    "config": config,
    "checkpoint": checkpoint,
    "text": text,
    "record": record,
    "cache": cache,
}


def truncated(path: Path, draw: random.Random) -> None:
    """It ends early."""
    os.truncate(path, draw.randrange(max(1, path.stat().st_size)))


def grown(path: Path, draw: random.Random) -> None:
    """It is followed by something."""
    with path.open("ab") as file:
        file.write(draw.randbytes(9))


def flipped(path: Path, draw: random.Random) -> None:
    """A few of its bits are others."""
    content = bytearray(path.read_bytes())
    for _ in range(3 if content else 0):
        content[draw.randrange(min(len(content), 4000))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def emptied(path: Path, draw: random.Random) -> None:
    """It has no bytes."""
    path.write_bytes(b"")


def random_bytes(path: Path, draw: random.Random) -> None:
    """It is noise."""
    path.write_bytes(draw.randbytes(200))


def deep_json(path: Path, draw: random.Random) -> None:
    """It is JSON, nested deeper than a parser goes."""
    path.write_text(draw.choice(("[", '{"a":')) * 100_000)


def other_json(path: Path, draw: random.Random) -> None:
    """It is JSON of another form."""
    path.write_text(json.dumps(draw.choice(JSON_VALUES)))


def removed(path: Path, draw: random.Random) -> None:
    """It is not there."""
    path.unlink()


def a_folder(path: Path, draw: random.Random) -> None:
    """A folder has its place."""
    path.unlink()
    (path / "inside").mkdir(parents=True)


def a_pipe(path: Path, draw: random.Random) -> None:
    """A pipe has its place, which nobody writes to."""
    path.unlink()
    os.mkfifo(path)


def a_loop(path: Path, draw: random.Random) -> None:
    """A link to itself has its place."""
    path.unlink()
    path.symlink_to(path.name)


def huge(path: Path, draw: random.Random) -> None:
    """A sparse file of 20 GiB, which says that it is one header."""
    path.write_bytes(struct.pack("<Q", 20 * 2**30))
    os.truncate(path, 8 + 20 * 2**30)


def header(path: Path, draw: random.Random) -> None:
    """The header of a safetensors file says something else."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        described = json.loads(content[8 : 8 + length])
    except ValueError:
        return random_bytes(path, draw)
    members = list(_members(described))
    node, key = draw.choice(members)
    if draw.random() < 0.3:
        del node[key]
    else:
        node[key] = copy.deepcopy(draw.choice(JSON_VALUES))
    text = json.dumps(described).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


DAMAGES = (
    truncated,
    grown,
    flipped,
    emptied,
    random_bytes,
    deep_json,
    other_json,
    removed,
    a_folder,
    a_pipe,
    a_loop,
    huge,
)

_GOOD = json.dumps({"text": "w3 w4 " * 40}).encode()
TEXTS: tuple[bytes, ...] = (
    *(b"", b" \n \n", b"\0" * 500, b"\xff\xfe\x00w", b"\xef\xbb\xbf" + _GOOD, b"\xc3\x28" * 50, "🙂 ".encode() * 90),
    *(b"[" * 100_000, b'{"a":' * 50_000, b"[]", b"{}", b"null", b"5", b'"text"', b"[1]", b"[[]]", b'[{"text": 5}]'),
    *(b'{"text": 5}', b'{"text": null}', b'{"text": ["a"]}', b'{"txt": "a"}', b'{"text": ""}', b'{"text": "\\ud800"}'),
    *(
        b'{"instruction": 5, "output": []}',
        b'{"instruction": "a"}',
        b'{"instruction": null, "input": 1, "output": "b"}',
    ),
    *(
        _GOOD + b"\n{",
        _GOOD + b"\n\n" + b"garbage",
        _GOOD * 3,
        b"NaN",
        b'{"text": NaN}',
        b"w3 " * 20_000,
        b"w3" * 50_000,
    ),
)
"""What a text may be instead."""


def _options() -> list[str]:
    """Every dotted key of the configuration."""
    container = OmegaConf.to_container(OmegaConf.structured(RunConfig, flags={"allow_objects": True}))
    assert isinstance(container, dict)
    free = ["method.name", "method.nested", "allocation.epsilon", "allocation.cap", "decomposition.mlp.ridge"]
    return sorted({*_dotted(container), *free})


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    if not isinstance(node, dict) or not node:
        yield prefix
        return
    for key, member in node.items():
        yield from _dotted(member, f"{prefix}.{key}" if prefix else str(key))


def _choices() -> list[str]:
    """Every option of our configuration groups, but for models that are not here."""
    root = config_directory()
    files = [path.relative_to(root) for path in root.rglob("*.yaml") if path.parent != root]
    return [
        f"{path.parent.as_posix()}={path.stem}"
        for path in sorted(files)
        if path.parts[0] not in ("hydra", "experiments", "tracking")
    ]


def _members(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every container inside ``node`` with each of its keys."""
    for key, member in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(member, dict | list):
            yield from _members(member)


def _reads_model(draw: random.Random) -> tuple[str, ...]:
    return draw.choice(
        (
            *(("modegpt", *SMALL),) * 3,
            ("modegpt", *SMALL, "method=dense", "evaluation=text", "evaluation.perplexity.path=text.jsonl"),
            ("modegpt", *SMALL, "out_of_core.enabled=true", "output.save_model=out"),
            ("modegpt-export", "model", "out"),
            ("modegpt-cut", "model", "0.3", "out"),
        )
    )


def _sealed(content: dict) -> dict:
    """The record with the hashes of what it now says, where it can have them."""
    try:
        content["identity"]["hash"] = identity(content["identity"]["decides"])
        return content | {"content_sha256": content_hash(content)}
    except (ValueError, TypeError, LookupError, AttributeError):
        return content
