"""W&B mirrors what is on disk and can break nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from modegpt.errors import UserError
from modegpt.records import tracking
from modegpt.records.pictures import save_pictures
from modegpt.records.store import RecordStore, load_record
from modegpt.records.tracking import NoTracker, headline, make_tracker, tables
from tests.records.sample import NUM_LAYERS, sample_record
from tests.records.wandb_server import WandbServer


@pytest.fixture
def saved(tmp_path: Path) -> tuple[dict, Path]:
    path = RecordStore(tmp_path / "results").write(sample_record())
    return load_record(path), path


def test_offline_writes_a_run_beside_the_record_and_nowhere_else(
    saved: tuple[dict, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    before = dict(os.environ)
    record, path = saved
    warnings: list[str] = []
    tracker = make_tracker(mode="offline", warn=warnings.append)
    tracker.mirror(record, record_path=path, pictures=save_pictures(record, path.parent))
    assert warnings == [] and capfd.readouterr() == ("", "")
    (run,) = (path.parent / "wandb").glob("offline-run-*")
    content = next(run.glob("run-*.wandb")).read_bytes()
    assert b"ppl_tiny_256" in content and b"demo" in content and b"nystrom" in content
    media = run / "files" / "media"
    logged = [file.relative_to(media).as_posix().partition("_")[0] for file in media.rglob("*.*") if file.is_file()]
    assert sorted(logged) == [
        "images/pictures/layers",
        "images/pictures/scores",
        "table/tables/layers",
        "table/tables/scores",
    ]
    staged = [file for file in (path.parent / "wandb" / "data" / "artifacts").rglob("*") if file.is_file()]
    held = [file.read_bytes() for file in staged]
    assert path.read_bytes() in held and (path.parent / "scores.png").read_bytes() in held, (
        "the artifact holds the record and the pictures"
    )
    short = record["identity"]["hash"][:8]
    for entry in (
        f"record-{short}",
        "record.json",
        "scores.png",
        "layers.png",
        "tables/scores.table.json",
        "tables/layers.table.json",
    ):
        assert entry.encode() in content, "what `wandb sync` will send names every entry of the artifact"
    assert list(home.rglob("*")) == [] and dict(os.environ) == before


def test_sync_sends_everything_after_results_was_moved(
    saved: tuple[dict, Path], tmp_path: Path, repository: Path
) -> None:
    """The command is that of the docs, in a folder that was moved as a whole."""
    record, path = saved
    warnings: list[str] = []
    pictures = save_pictures(record, path.parent)
    make_tracker(mode="offline", warn=warnings.append).mirror(record, record_path=path, pictures=pictures)
    assert warnings == []
    stored, drawn = path.read_bytes(), {picture.name: picture.read_bytes() for picture in pictures}
    moved = tmp_path / "elsewhere" / path.parent.relative_to(tmp_path)
    moved.parent.parent.mkdir(parents=True)
    (tmp_path / "results").rename(tmp_path / "elsewhere" / "results")
    command = "wandb sync --yes"
    assert command in (repository / "docs" / "experiments.md").read_text(encoding="utf-8")
    kept = WandbServer()
    with kept.serve() as url:
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        program = Path(sys.executable).parent
        environment |= {
            "WANDB_BASE_URL": url,
            "WANDB_API_KEY": "0" * 40,
            "HOME": str(tmp_path),
            "PATH": f"{program}{os.pathsep}{os.environ['PATH']}",
        }
        done = subprocess.run(
            ["sh", "-c", command], cwd=moved, env=environment, capture_output=True, text=True, timeout=100, check=False
        )
    assert done.returncode == 0, done.stderr
    sent = kept.artifacts[f"record-{record['identity']['hash'][:8]}"]
    assert {"record.json": stored, **drawn}.items() <= sent.items()
    shown = json.loads(kept.files["wandb-summary.json"])
    for name in ("scores", "layers"):
        assert shown[f"tables/{name}"]["_type"] == "table-file" and shown[f"pictures/{name}"]["_type"] == "image-file"
        assert any(f"tables/{name}.table.json" in files for files in kept.artifacts.values())


def test_disabled_does_not_import_wandb(saved: tuple[dict, Path]) -> None:
    code = (
        "import json, sys; from pathlib import Path; from modegpt.records.tracking import make_tracker; "
        "path = Path(sys.argv[1]); tracker = make_tracker(mode='disabled'); "
        "tracker.mirror(json.loads(path.read_text()), record_path=path); print('wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved[1])], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert sorted(path.name for path in saved[1].parent.iterdir()) == ["record.json"]


def test_a_failure_is_one_warning(
    saved: tuple[dict, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import wandb

    def fail(**_: object) -> None:
        raise OSError("the network is gone\nand more")

    monkeypatch.setattr(wandb, "init", fail)
    record, path = saved
    before = path.read_bytes()
    make_tracker(mode="offline").mirror(record, record_path=path)
    out, err = capsys.readouterr()
    assert (
        out == "" and err == f"warning: not mirrored to W&B (offline): the network is gone; the record is in {path}\n"
    )
    assert path.read_bytes() == before


def test_online_without_a_key_warns_at_once(
    saved: tuple[dict, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    warnings: list[str] = []
    make_tracker(mode="online", warn=warnings.append).mirror(saved[0], record_path=saved[1])
    assert len(warnings) == 1 and "wandb login" in warnings[0] and "\n" not in warnings[0]


def test_modes(repository: Path) -> None:
    with pytest.raises(UserError, match="offline, online, disabled"):
        make_tracker(mode="of")
    assert isinstance(make_tracker(mode="disabled"), NoTracker)
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (repository / "conf" / "tracking").glob("*.yaml")}
    assert set(files) == set(tracking.MODES)
    for mode, values in files.items():
        assert values["mode"] == mode and values.keys() == {"mode", "project", "entity", "group", "tags"}
        make_tracker(**values)


def test_what_is_sent_is_the_record() -> None:
    record = sample_record()
    metrics = headline(record)
    assert metrics["ppl_tiny_256"] == 5.5 and metrics["dense/ppl_tiny_256"] == 4.0
    assert metrics["zeroshot_pronouns"] == 0.75 and metrics["retention/zeroshot_hard_facts"] == pytest.approx(0.8)
    assert (
        metrics["achieved_sparsity"] == 0.299
        and metrics["seconds"] == 5.0
        and metrics["peak_memory_bytes/host"] == 3 * 2**29
    )
    json.dumps(metrics, allow_nan=False)
    columns, rows = tables(record)["layers"]
    assert len(rows) == NUM_LAYERS
    last = dict(zip(columns, rows[-1], strict=True))
    assert last["index"] == 5 and last["sparsity"] == pytest.approx(0.45) and last["ranks_query_key"] == 8
    assert (
        set(tables(sample_record(dense=True))) == {"scores"}
        and headline(sample_record(dense=True))["ppl_tiny_256"] == 4.0
    )
