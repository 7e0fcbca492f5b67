"""``--help`` is the table of contents."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from modegpt.cli.schema import config_groups


def test_help_shows_groups_examples_and_values(job: Callable, capfd: pytest.CaptureFixture) -> None:
    code, calls = job("--help")
    text = capfd.readouterr().out
    assert code == 0 and calls == []
    for group in config_groups():
        assert f"\n{group}: " in text
    for part in ("modegpt --multirun", "compression:", "  sparsity: 0.3", "nystrom", "modegpt-records"):
        assert part in text
    assert "Powered by" not in text


def test_show_the_configuration(job: Callable, capfd: pytest.CaptureFixture) -> None:
    code, calls = job("--cfg", "job", "--resolve", "seed=5")
    assert code == 0 and calls == []
    assert "seed: 5" in capfd.readouterr().out


def test_help_and_a_refusal_wait_for_neither_pytorch_nor_transformers(tmp_path: Path) -> None:
    """What classes offer is known from the first time, and asked again where a source file has changed."""
    program = (
        "import sys; from modegpt.cli.main import main; code = main(sys.argv[1:]);"
        "print(code, *sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )

    def last_line(*arguments: str) -> str:
        command = [sys.executable, "-c", program, *arguments]
        environment = os.environ | {"MODEGPT_CACHE": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[-1]

    assert last_line("--help") == "0 torch transformers"
    assert last_line("--help") == "0"
    assert last_line("compression.sparsity=2") == "1"
    assert last_line("compresion.sparsity=0.2") == "1"
