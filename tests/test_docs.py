"""The pages say what is true: links and paths lead somewhere, numbers are those of the records, examples run."""

import re
import subprocess
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from modegpt.data.embedded import TINY_MODELS
from modegpt.records.frame import load_records

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
PAGES = [README, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
FOLDERS = sorted(path.name for path in REPOSITORY.iterdir() if path.is_dir() and not path.name.startswith("."))
RESULTS = {"stories260K": ("methods", 3), "babyllama-105": ("methods", 3), "smollm2-135m": ("real_models", 1)}
"""The models of the README's table, the experiment that holds their runs, and how many seeds it has."""
METHODS = {
    "SliceGPT": {"method": "slicegpt"},
    "MoDeGPT, uniform": {"method": "modegpt", "allocation": "uniform"},
    "MoDeGPT, the paper's allocation": {"method": "modegpt", "allocation": "entropic"},
    "MoDeGPT plus": {"method": "modegpt_plus"},
}
SPARSITIES = (0.1, 0.3, 0.5)


def short(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)


def tracked(*patterns: str) -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=REPOSITORY, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    return [REPOSITORY / name for name in listing.stdout.split("\0") if name and (REPOSITORY / name).is_file()]


def test_the_readme_is_a_screen_and_a_half() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 110


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_links_lead_somewhere(page: Path) -> None:
    for target in map("".join, re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", prose(page))):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert path.is_relative_to(DOCS) or not page.is_relative_to(DOCS), f"{target} is not in the site"
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_named_paths_exist(page: Path) -> None:
    """Changes name what is gone; everything else names what is there."""
    if page.name == "CHANGELOG.md":
        return
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if re.match(rf"(?:{'|'.join(FOLDERS)})/[\w./*-]*$", code):
            assert any(REPOSITORY.glob(code.rstrip("/"))), code


def test_every_page_is_in_the_site() -> None:
    def files(entries: list) -> list[str]:
        values = [value for entry in entries for value in (entry.values() if isinstance(entry, dict) else [entry])]
        return [name for value in values for name in (files(value) if isinstance(value, list) else [value])]

    named = files(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text("utf-8"))["nav"])
    assert sorted(named) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize("group", ["mlp", "query_key", "value_output"])
def test_every_decomposition_is_described(group: str) -> None:
    """A row for each choice, and none for what is no choice."""
    text = (DOCS / "decompositions.md").read_text("utf-8").partition(f"`decomposition/{group}`")[2].partition("## ")[0]
    choices = {path.stem for path in (REPOSITORY / "conf" / "decomposition" / group).glob("*.yaml")} - {"none"}
    assert set(re.findall(r"^\| `(\w+)`", text, re.M)) == choices


def test_every_method_is_described() -> None:
    text = (DOCS / "methods.md").read_text("utf-8")
    choices = {path.stem for path in (REPOSITORY / "conf" / "method").glob("*.yaml")}
    assert set(re.findall(r"^\| `method=(\w+)`", text, re.M)) == choices


def cell(value: float) -> str:
    """Three digits."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def results_table() -> str:
    """The README's table, from the records: perplexity, the mean over the runs of all seeds."""
    frame = load_records(REPOSITORY / "results")
    heads = [
        f"{name} {100 * sparsity:.0f}%" if sparsity == SPARSITIES[0] else f"{100 * sparsity:.0f}%"
        for name in RESULTS
        for sparsity in SPARSITIES
    ]
    rows: dict[str, list[str]] = {"dense": [], **{label: [] for label in METHODS}}
    for name, (experiment, num_seeds) in RESULTS.items():
        runs = frame[(frame.model == name) & frame.experiment.isin([experiment, "plus_uniform"])]
        [text] = {column for column in runs.columns if column.startswith("ppl_") and runs[column].notna().any()}
        rows["dense"] += [cell(runs[f"dense_{text}"].mean()), *[""] * (len(SPARSITIES) - 1)]
        for label, chosen in METHODS.items():
            of_method = runs[(runs[list(chosen)] == list(chosen.values())).all(axis=1)]
            for sparsity in SPARSITIES:
                values = of_method[of_method.target_sparsity == sparsity][text]
                assert len(values) in (0, num_seeds), (name, label, sparsity)
                rows[label].append(cell(values.mean()) if len(values) else "")
    lines = [["removed", *heads], *([label, *cells] for label, cells in rows.items())]
    lines.insert(1, ["---", *["--:"] * len(heads)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_table_is_that_of_the_records() -> None:
    [shown] = re.findall(r"<!-- table -->\n(.*?)<!-- /table -->", README.read_text("utf-8"), re.S)
    assert shown == results_table()


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an embedded model and text, in place of the hub's."""
    [block] = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    here = block.replace('"HuggingFaceTB/SmolLM2-135M"', repr(str(TINY_MODELS["tiny-llama"]))).replace(
        '"wikitext2"', '"tiny"'
    )
    names: dict = {}
    exec(compile(here, str(README), "exec"), names)
    assert abs(names["small"].modegpt_report["compression"]["achieved_sparsity"] - 0.3) < 0.01
    assert names["again"].num_parameters() == names["small"].num_parameters()


def test_the_quickstart_runs(tmp_path: Path) -> None:
    """From top to bottom in a fresh kernel; what it prints is what its text says. Committed without outputs."""
    notebook = nbformat.read(REPOSITORY / "examples" / "quickstart.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = ["".join(output.text for output in cell.outputs if output.get("name") == "stdout") for cell in code]
    assert "30.0% of the block-linear weights are gone" in printed[2]
    dense, compressed = (float(value) for value in re.findall(r"\d+\.\d+", printed[3]))
    assert 1 < dense < compressed < 1.5 * dense
    assert len(printed[4].splitlines()) == 4 and f"{compressed:7.3f}  the paper" in printed[4]
    assert printed[5].startswith("Once upon a time") and (tmp_path / "smaller" / "README.md").is_file()
