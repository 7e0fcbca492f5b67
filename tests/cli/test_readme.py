"""Every example of the README is a configuration that the main job accepts."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
TABLES = [
    example for line in README.splitlines() if line.startswith("| ") for example in re.findall(r"`([^`]+=[^`]+)`", line)
]
COMMANDS = re.findall(r"^ {4}(?:\.venv/bin/)?modegpt (.+)$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("example", [*TABLES, *(command for command in COMMANDS if "--multirun" not in command)])
def test_example(job: Callable, example: str) -> None:
    code, calls = job(*shlex.split(example))
    assert code == 0 and len(calls) == 1


@pytest.mark.parametrize("command", [command for command in COMMANDS if "--multirun" in command])
def test_sweep_composes(job: Callable, command: str, tmp_path: Path) -> None:
    """Each as a sweep in this process, of an experiment at one rate, with its launcher's configuration composed apart."""
    arguments = shlex.split(command, comments=True)
    own = [argument for argument in arguments if not argument.startswith("hydra")]
    own += ["compression.sparsity=0.5"] * ("+experiments=" in command)
    code, calls = job(*own, f"output.root={tmp_path}")
    assert code == 0 and len(calls) > 1
    assert (
        job(
            "--cfg",
            "hydra",
            "-p",
            "hydra.launcher",
            *(argument for argument in arguments if argument.startswith("hydra")),
        )[0]
        == 0
    )


def test_the_readme_has_examples() -> None:
    assert len(TABLES) > 15 and len(COMMANDS) > 5
