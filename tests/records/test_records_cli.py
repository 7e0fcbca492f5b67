"""``modegpt-records``, as its user sees it."""

import json
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from modegpt.records.cli import main
from modegpt.records.scores import difference_stderr
from modegpt.records.store import RecordStore, load_record
from tests.records.sample import sample_record, with_items


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = RecordStore(tmp_path / "results")
    store.write(sample_record())
    store.write(sample_record(sparsity=0.5, experiment="rates"))
    store.write_error(
        experiment="rates",
        name="broken",
        decides={"sparsity": 0.9},
        stage="compress",
        message="rank 0 in layer 3",
        command="modegpt",
    )
    return store.root


def run(root: Path, capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    status = main(["--root", str(root), *arguments])
    return status, *capsys.readouterr()


def test_list(root: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, _ = run(root, capsys, "list")
    assert status == 0 and "2 finished, 1 failed" in out
    assert "failed: rates/broken at compress: rank 0 in layer 3" in out
    (line,) = [line for line in out.splitlines() if "rates" in line and "modegpt 0.5" in line]
    assert line.split()[-5:] == ["49.9", "%", "6.50", "79.0", "%"]
    _, out, _ = run(root, capsys, "list", "--experiment", "demo")
    assert "1 finished, 0 failed" in out and "rates" not in out


def test_show(root: Path, capsys: pytest.CaptureFixture) -> None:
    record = load_record(RecordStore(root).paths()[0])
    hash = record["identity"]["hash"]
    status, by_hash, _ = run(root, capsys, "show", hash[:6])
    assert status == 0 and "29.90 % of the block-linear weights removed" in by_hash and record["command"] in by_hash
    for reference in (record["name"], str(RecordStore(root).paths()[0]), str(RecordStore(root).paths()[0].parent)):
        assert run(root, capsys, "show", reference)[1].splitlines()[0] == by_hash.splitlines()[0]
    assert json.loads(run(root, capsys, "show", "--json", hash)[1]) == record


def test_compare(root: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, _ = run(root, capsys, "compare", "tiny-llama modegpt 0.3", "tiny-llama modegpt 0.5")
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert status == 0 and lines["config.compression.sparsity"] == ["0.3", "0.5"]
    assert "config.seed" not in out and "config.allocation.epsilon" not in out
    assert lines["ppl_tiny_256"] == ["5.50", "(dense", "4.00)", "6.50", "(dense", "4.00)"]
    over = [line.split()[-2:] for line in out.splitlines() if line.startswith("  over the first (points)")]
    assert over == [["-", "+0.0"]] * 6, "without the items there is no standard error to say"
    status, _, err = run(root, capsys, "compare", "tiny-llama modegpt 0.3", "tiny-llama modegpt 0.3")
    assert status == 2 and err == "modegpt-records: error: compare needs two different records\n"


def test_compare_says_how_sure_a_difference_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store = RecordStore(tmp_path / "results")
    first, other, elsewhere = (with_items(sample_record(seed=seed), seed) for seed in range(3))
    elsewhere["identity"]["decides"]["evaluation"] = {"tasks": {"easy_facts": "other items"}}
    paths = [str(store.write(record)) for record in (first, other, elsewhere)]
    lines = run(store.root, capsys, "compare", *paths)[1].splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("zeroshot_easy_facts"))
    accuracies = [
        record["metrics"]["compressed"]["zeroshot"]["easy_facts"]["value"] for record in (first, other, elsewhere)
    ]
    points = [f"{100 * (accuracy - accuracies[0]):+.1f}" for accuracy in accuracies[1:]]
    stderr = difference_stderr(other, first, "zeroshot_easy_facts")
    assert lines[at + 1].split() == [
        "over",
        "the",
        "first",
        "(points)",
        "-",
        points[0],
        "±",
        f"{100 * stderr:.1f}",
        points[1],
    ]


def test_a_listing_shows_control_characters_and_does_not_obey_them(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    record = sample_record()
    record["name"] = record["model"]["name"] = record["command"] = "a\x1b[2J\u202eb\x9b"
    store = RecordStore(tmp_path / "results")
    path = store.write(record)
    store.write(sample_record(seed=1) | {"name": "other\x1b[2J", "experiment": "demo"})
    store.write_error(
        experiment="demo", name="c\x1b[2J", decides={"a": 1}, stage="x\x1b[2J", message="m\x1b[2J", command="modegpt"
    )
    found = json.loads(path.read_text())["identity"]["hash"]
    other = next(entry.load()["identity"]["hash"] for entry in store.entries() if entry.path != path)
    for command in (["list"], ["show", found], ["compare", found, other], ["show", "no\x1b[2J"]):
        _, out, err = run(store.root, capsys, *command)
        assert not {"\x1b", "\x9b", "\u202e"} & set(out + err) and r"\x1b[2J" in out + err, command
    shown = run(store.root, capsys, "show", "--json", found)[1]
    assert "\x9b" not in shown and json.loads(shown) == load_record(path)
    damaged = tmp_path / "results" / "demo" / "x\x1b[2J" / "record.json"
    damaged.parent.mkdir()
    damaged.write_text("{}")
    for command in (["list"], ["verify"], ["export", "--csv", str(tmp_path / "all.csv")]):
        assert "\x1b" not in "".join(run(store.root, capsys, *command)[1:])


def test_an_exported_table_holds_no_formula(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record = sample_record()
    record["name"] = record["model"]["name"] = '=HYPERLINK("http://x")'
    store = RecordStore(tmp_path / "results")
    store.write(record)
    assert run(store.root, capsys, "export", "--csv", str(tmp_path / "all.csv"))[0] == 0
    [row] = pandas.read_csv(tmp_path / "all.csv").to_dict("records")
    assert row["name"] == row["model"] == '\'=HYPERLINK("http://x")'
    assert row["ppl_tiny_256"] == pytest.approx(5.5) and row["target_sparsity"] == 0.3


def test_verify(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(root, capsys, "verify")[:2] == (0, "2 records, all whole and unchanged\n")
    path = RecordStore(root).paths()[1]
    path.write_text(path.read_text().replace("0.499", "0.498"))
    status, out, _ = run(root, capsys, "verify")
    assert (
        status == 1
        and out.startswith(f"{path}: content_sha256 does not match")
        and out.endswith("2 records, 1 problems\n")
    )


def test_export(root: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    csv, parquet = tmp_path / "all.csv", tmp_path / "all.parquet"
    assert (
        run(root, capsys, "export", "--csv", str(csv))[0]
        == run(root, capsys, "export", "--parquet", str(parquet))[0]
        == 0
    )
    for frame in (pandas.read_csv(csv), pandas.read_parquet(parquet)):
        assert sorted(frame["ppl_tiny_256"]) == pytest.approx([5.5, 6.5])
    status, _, err = run(root, capsys, "export", "--csv", str(tmp_path / "no" / "where.csv"))
    assert status == 2 and err.startswith("modegpt-records: error: cannot write") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["show", "nothing"], "no record 'nothing'"),
        (["show", "1" * 5000], "no record '111"),
        (["list"], "not a directory"),
        (["verify"], "not a directory"),
    ],
)
def test_mistakes_are_one_line(root: Path, capsys: pytest.CaptureFixture, arguments: list[str], complaint: str) -> None:
    status, out, err = run(root if "no record" in complaint else root / "absent", capsys, *arguments)
    assert status == 2 and out == "" and complaint in err and err.count("\n") == 1


def test_an_ambiguous_name_asks_for_more(root: Path, capsys: pytest.CaptureFixture) -> None:
    RecordStore(root).write(sample_record(seed=7))
    status, _, err = run(root, capsys, "show", "tiny-llama modegpt 0.3")
    assert status == 2 and "means 2 records" in err


def test_looking_at_records_needs_no_torch() -> None:
    heavy = {"torch", "pandas", "wandb", "matplotlib"}
    code = f"import sys, modegpt.records.cli; print(sorted({heavy} & sys.modules.keys()))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_pack_and_unpack_end_well(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(root, capsys, "pack", "demo")[0] == 0
    status, out, _ = run(root, capsys, "unpack", "demo")
    assert status == 0 and out.strip().endswith("demo: 1 records")
