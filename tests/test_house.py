"""What a reader can rely on in every tracked file: nothing names one machine or registry, and no line is too wide."""

import gzip
import json
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from modegpt.records.paths import portable

COLUMNS = 120
PLACES = "|".join(("root", "home", "work", "Users", "opt", "mnt"))
MACHINE = re.compile(
    rf"(?<![\w./~$<>{{}}-])/(?:{PLACES})/\w|file:/"
    + "//|"
    + "|".join(("index" + "-url", "find" + "-links", r"python" + r"hosted\.", "pypi" + r"\.org"))
)


def tracked(repository: Path) -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=repository, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    return [path for name in listing.stdout.split("\0") if name and (path := repository / name).is_file()]


def lines_of(paths: Iterable[Path], repository: Path) -> Iterator[tuple[str, str]]:
    """Each line of each text file after its place, ``FILE:NUMBER``."""
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # weights and pictures
            continue
        for number, line in enumerate(lines, 1):
            yield f"{path.relative_to(repository)}:{number}", line


def test_no_file_names_a_machine(repository: Path) -> None:
    lines = lines_of(tracked(repository), repository)
    assert not [f"{place}: {line.strip()[:80]}" for place, line in lines if MACHINE.search(line)]


def test_no_committed_record_names_a_machine(repository: Path) -> None:
    """Not in its command either, which is what a reader would run again."""
    seen = []
    for path in tracked(repository):
        if path.name.endswith(".jsonl.gz"):
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                for line in lines:
                    words = shlex.split(json.loads(line)["command"])
                    if MACHINE.search(line) or portable(words, repository) != words:
                        seen.append(f"{path.name}: {shlex.join(words)}")
    assert not seen


def test_no_line_of_code_or_prose_is_wider_than_the_page(repository: Path) -> None:
    pages = [path for path in tracked(repository) if path.suffix in (".py", ".md")]
    assert not [f"{place}: {len(line)}" for place, line in lines_of(pages, repository) if len(line) > COLUMNS]


@pytest.mark.parametrize("text", ["see /ho" + "me/me/x", '"/wo' + 'rk/main"', "--find" + "-links=x"])
def test_the_pattern_sees_machines(text: str) -> None:
    assert MACHINE.search(text)
    assert not MACHINE.search("results/work/x, <root>/experiment and https://example.org/home/x")
