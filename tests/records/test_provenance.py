"""Provenance says what ran, and never on whose machine."""

import json
import os
import platform
import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch

from modegpt.records.paths import portable
from modegpt.records.provenance import command_line, git_state, provenance

ELSEWHERE = os.sep + os.path.join("srv", "alice", "models", "babyllama-105")


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(
        ["git", "-C", str(directory), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_provenance_is_plain_json_without_the_machine() -> None:
    node = provenance()
    text = json.dumps(node, allow_nan=False)
    assert socket.gethostname() not in text and portable(node) == node
    assert node["packages"]["torch"] == torch.__version__ and node["python"] == platform.python_version()
    assert node["hardware"]["num_cores"] >= 1 and node["hardware"]["memory_bytes"] > 2**28


def test_git_state_sees_code_and_not_results(tmp_path: Path) -> None:
    package = tmp_path / "modegpt"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert git_state(package) == {"commit": None, "dirty": None}
    git(tmp_path, "init", "-q")
    assert git_state(package) == {"commit": None, "dirty": None}  # in a repository, but not of it
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(package) == {"commit": head, "dirty": False}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "record.json").write_text("{}")
    assert git_state(package) == {"commit": head, "dirty": False}
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("seed: 1")
    assert git_state(package) == {"commit": head, "dirty": True}
    (tmp_path / "conf" / "config.yaml").unlink()
    (package / "__init__.py").write_text("x = 1")
    assert git_state(package) == {"commit": head, "dirty": True}


def test_portable_paths(tmp_path: Path) -> None:
    inside = str(tmp_path / "data" / "a b.txt")
    config: dict[str, Any] = {"path": ELSEWHERE, "inside": inside}
    config |= {"typed": "../shared/models", "list": [ELSEWHERE, 3, None], "url": "https://example.org/a/b"}
    assert portable(config, tmp_path) == {
        "path": ".../babyllama-105",
        "inside": "data/a b.txt",
        "typed": "../shared/models",
        "list": [".../babyllama-105", 3, None],
        "url": "https://example.org/a/b",
    }
    assert portable(f"cannot read {ELSEWHERE}: 3/4 done", tmp_path) == "cannot read .../babyllama-105: 3/4 done"
    assert portable(f"model.path={ELSEWHERE} x", tmp_path) == "model.path=.../babyllama-105 x"
    assert portable(f"a={ELSEWHERE} b={ELSEWHERE}", tmp_path) == "a=.../babyllama-105 b=.../babyllama-105"
    assert (
        portable(f"paths=[{ELSEWHERE},{inside.replace(' ', '_')}]", tmp_path)
        == "paths=[.../babyllama-105,data/a_b.txt]"
    )
    assert portable(f"file://{ELSEWHERE}", tmp_path) == ".../babyllama-105"
    assert portable(str(tmp_path), tmp_path) == "."


def test_command_line_can_be_typed_again(tmp_path: Path) -> None:
    arguments = ["model=local", "model.path=models/a", "calibration.tags=[a, b]", f"out={ELSEWHERE}"]
    assert shlex.split(command_line(arguments, program="python -m modegpt")) == [
        *("python", "-m", "modegpt"),
        *arguments[:3],
        "out=.../babyllama-105",
    ]
    assert command_line([]) == "modegpt"
