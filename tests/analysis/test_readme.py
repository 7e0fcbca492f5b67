"""The committed front page of the results is what the committed records say."""

import re
from pathlib import Path

import pytest
from PIL import Image

from analysis.claims import claims
from analysis.expected import screen
from analysis.figures import DRAWN_FROM, Panel, fingerprint, panels
from analysis.readme import SHOWN, SOURCES, readme
from analysis.runs import Run, load_runs
from analysis.specs import TABLES
from analysis.tables import build

LARGEST_PICTURE = 100_000


@pytest.fixture(scope="module")
def runs(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Of the committed archives; a checkout may hold runs of its own beside them."""
    root = tmp_path_factory.mktemp("committed")
    for archive in (repository / "results").glob("*.jsonl.gz"):
        (root / archive.name).symlink_to(archive)
    return screen(load_runs(root))[0]


@pytest.fixture(scope="module")
def drawn(runs: list[Run]) -> dict[str, list[Panel]]:
    return {spec.name: panels(spec, runs) for spec in SHOWN}


def test_the_page_is_current(repository: Path, runs: list[Run], drawn: dict[str, list[Panel]]) -> None:
    results = repository / "results"
    tables = {table.name: table for spec in TABLES if spec.name in SOURCES for table in build(spec, runs)}
    assert (results / "README.md").read_text(encoding="utf-8") == readme(runs, claims(runs, results), tables, drawn), (
        "results/README.md is stale; run `make paper`"
    )


def test_the_pictures_are_current_small_and_named(repository: Path, drawn: dict[str, list[Panel]]) -> None:
    folder = repository / "results" / "figures"
    assert {path.name for path in folder.iterdir()} == {f"{spec.name}.png" for spec in SHOWN}
    assert len(SHOWN) <= 6
    for spec in SHOWN:
        path = folder / f"{spec.name}.png"
        assert path.stat().st_size < LARGEST_PICTURE, path.name
        with Image.open(path) as image:
            assert image.info[DRAWN_FROM] == fingerprint(spec, drawn[spec.name]), f"{path} is stale; run `make paper`"


def test_links_lead_somewhere_and_lines_are_short(repository: Path) -> None:
    page = repository / "results" / "README.md"
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(targets) == len(SHOWN) and all((page.parent / target).is_file() for target in targets)
    assert max(map(len, text.splitlines())) <= 120
