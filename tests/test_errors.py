"""How commands end and print."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modegpt.records.store import RecordStore
from tests.processes import STUCK_SECONDS
from tests.records.sample import sample_record


@pytest.mark.parametrize("command", ["list", "show"])
def test_a_terminal_of_ascii_alone_shows_what_it_can(command: str, tmp_path: Path) -> None:
    path = RecordStore(tmp_path).write(sample_record(name="tiny-llama ± 30"))
    arguments = [sys.executable, "-m", "modegpt.records.cli", "--root", str(tmp_path), command]
    shown = subprocess.run(
        arguments + ([str(path)] if command == "show" else []),
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
        timeout=STUCK_SECONDS,
    ).stdout.decode("ascii")
    assert "tiny-llama" in shown and "?" in shown
