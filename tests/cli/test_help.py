"""``--help`` is the table of contents."""

from collections.abc import Callable

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
