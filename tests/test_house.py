"""What a reader can rely on in every tracked file: nothing that names one machine or one registry."""

import re
import subprocess
from pathlib import Path

import pytest

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


def test_no_file_names_a_machine(repository: Path) -> None:
    found = []
    for path in tracked(repository):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # weights and pictures
            continue
        found += [
            f"{path.relative_to(repository)}:{number}: {line.strip()[:80]}"
            for number, line in enumerate(lines, 1)
            if MACHINE.search(line)
        ]
    assert not found


@pytest.mark.parametrize("text", ["see /ho" + "me/me/x", '"/wo' + 'rk/main"', "--find" + "-links=x"])
def test_the_pattern_sees_machines(text: str) -> None:
    assert MACHINE.search(text)
    assert not MACHINE.search("results/work/x, <root>/experiment and https://example.org/home/x")
