"""Bad input of every kind, in this process: no traceback, no hang, one line, nothing half-written, nothing lost.

``FUZZ_SEED=7 FUZZ_CASES=100 pytest -m large tests/fuzz`` draws others, ``FUZZ_CASES`` of each kind.
"""

import contextlib
import hashlib
import io
import logging
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from analysis.__main__ import main as analysis
from modegpt.cli.cut import main as cut
from modegpt.cli.export import main as export
from modegpt.cli.main import main as modegpt
from modegpt.records.cli import main as records
from tests.fuzz.cases import KINDS, Case, cases, furnish
from tests.models.family_table import native_model
from tests.models.saved import tiny_tokenizer

SEED, CASES = int(os.environ.get("FUZZ_SEED", "0")), int(os.environ.get("FUZZ_CASES", "50"))
SECONDS = 60
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "modegpt": modegpt,
    "modegpt-cut": cut,
    "modegpt-export": export,
    "modegpt-records": records,
    "analysis": analysis,
}
MAY_WRITE = ("results/*/*/error.json", "cache/objects/*/*")
"""What a run that failed may leave."""


MORE_BYTES = 3 * 2**30
"""Memory that a command may take beside what this process has."""


class Hangs(BaseException):
    """Passes every ``except Exception``."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 30 kB with its tokenizer."""
    place = tmp_path_factory.mktemp("fuzz") / "model"
    native_model("llama").save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory() -> Iterator[None]:
    """What is read for ever, or whole though it is huge, ends in an error before it takes the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.large
@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_ends_in_one_line_and_leaves_what_was_there(
    kind: str, model: Path, capfd: pytest.CaptureFixture
) -> None:
    complaints, refused, hangs = [], 0, 0
    number_of = CASES // 5 if kind == "cache" else CASES  # two whole runs each
    for number, case in enumerate(cases(kind, SEED, number_of)):
        if hangs == 3:
            break
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            furnish(folder, model)
            case.prepare(folder)
            before = contents(folder)
            capfd.readouterr()
            code = call(case.command, folder)
            out, err = capfd.readouterr()
            refused += code in (1, 2)
            hangs += str(code).startswith("hangs")
            found = [*complaints_about(case, code, out, err), *losses(code, before, contents(folder), case)]
            complaints += [f"{kind} {number}: {case}\n    {complaint}" for complaint in found]
            with capfd.disabled():
                print(*complaints[len(complaints) - len(found) :], sep="\n", end="\n" if found else "")
    with capfd.disabled():
        print(f"\n{kind}: {number_of} cases, {refused} refused, {len(complaints)} complaints")
    assert not complaints, f"{len(complaints)} complaints, which are above"
    assert refused or kind == "cache", "the cases are not bad"


def call(command: tuple[str, ...], folder: Path) -> int | str:
    """Run the command in ``folder`` as a process would; returns its exit code, or how it ended instead."""
    program, *arguments = command
    with in_folder(folder), at_most(SECONDS):
        try:
            return COMMANDS[program](arguments)
        except SystemExit as stopped:
            return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        except Hangs:
            return f"hangs at {''.join(traceback.format_exc(limit=-3).splitlines(keepends=True)[-8:])}"
        except BaseException:
            traceback.print_exc()
            return "raises"


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """What a process of its own has: its folder, its warnings on standard error, its number of threads."""
    home, level = Path.cwd(), logging.getLogger().level
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = lambda *told, **_: print(f"warning: {told[0]}", file=sys.stderr)
            yield
    finally:
        os.chdir(home)
        torch.set_num_threads(1)
        logging.getLogger().setLevel(level)


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise `Hangs` in the block when it takes longer."""

    def stop(*_: object) -> None:
        signal.alarm(5)  # again, where something caught it
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def complaints_about(case: Case, code: int | str, out: str, err: str) -> Iterator[str]:
    """What is wrong with how a command ended."""
    if code not in (0, 1, 2):
        yield f"it {code}: {err[-1500:]}"
        return
    if "Traceback" in out + err:
        yield f"a traceback: {err[-1500:]}"
    if "out of memory" in err:
        yield f"a small input takes {MORE_BYTES} bytes: {err[-500:]}"
    if any(advice in out + err for advice in ("ignore_mismatched_sizes", "weights_only", "trust_remote_code=True")):
        yield f"the advice of others: {err[-500:]}"
    lines = [line for line in err.splitlines() if not line.startswith(("warning: ", "[transformers] "))]
    usage = case.command[0] != "modegpt" and lines[:1] and lines[0].startswith("usage: ")
    if code and not usage and len(lines) != 1 and not (case.command[:1] == ("modegpt-records",) and not lines):
        yield f"{len(lines)} lines on standard error: {err[:1500]!r}"
    if code and not usage and any("error: " not in line for line in lines):
        yield f"no error: {err[:500]!r}"
    if code and lines and len(max(lines, key=len)) > 2000 + len(" ".join(case.command)):
        yield f"a line of {len(max(lines, key=len))} characters"
    if {"\x1b", "\x9b"} & set(out + err):
        yield f"control characters: {(out + err)[:500]!r}"


def contents(folder: Path) -> dict[str, str]:
    """Every file, link and pipe below ``folder`` and the hash of what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"to {os.readlink(path)}"
        elif path.is_file():
            large = path.stat().st_size > 2**24
            found[name] = "large" if large else hashlib.sha256(path.read_bytes()).hexdigest()
        elif not path.is_dir():
            found[name] = "a pipe"
    return found


def losses(code: int | str, before: dict[str, str], after: dict[str, str], case: Case) -> Iterator[str]:
    """What a command did to files that it should have left alone, or left half done."""
    packs = case.command[0] == "modegpt-records" and {"pack", "unpack"} & set(case.command)
    asked = case.command[-1] if "export" in case.command and not code else None  # to replace it
    repaired = "cache/" if case.kind == "cache" else "none/"
    for name, content in before.items():
        if after.get(name) != content and not (packs and code == 0) and name != asked and not name.startswith(repaired):
            yield f"{name} was {'changed' if name in after else 'removed'}"
    for name in after.keys() - before.keys():
        parts = name.split("/")
        if any(part.startswith((".new-", ".old-")) or ".partial" in part for part in parts):
            yield f"{name} was left half-written"
        elif code and not any(Path(name).match(pattern) for pattern in MAY_WRITE):
            yield f"{name} was written by a command that failed"
    if "ran" in after:
        yield "a command in a value was run"


def test_the_generator_draws_the_same_cases_for_a_seed() -> None:
    for kind in KINDS:
        drawn = [[str(case) for case in cases(kind, seed, 5)] for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2]


def test_a_hang_is_seen() -> None:
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), pytest.raises(Hangs), at_most(1):
        signal.pause()
