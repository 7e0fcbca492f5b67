"""What the conversion of a GGUF file says to a mistake, before it reads anything."""

import sys
from pathlib import Path

import pytest

from tests.scripts import load_script


@pytest.mark.parametrize(("file", "folder", "said"), [("none.gguf", "new", "none.gguf is not a file"), ("some.gguf", ".", "exists already"), ("some.gguf", "new", "pip install gguf")])
def test_a_mistake_is_one_line(file: str, folder: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    script = load_script("from_gguf")
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["from_gguf.py", str(tmp_path / file), str(tmp_path / folder)])
    assert script.main() == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
