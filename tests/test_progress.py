"""Progress: bars on a terminal, few lines in a log, silence on request."""

import io
import sys

import pytest

import modegpt.progress
from modegpt.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """``clock[0]`` is the time."""
    now = [100.0]
    monkeypatch.setattr(modegpt.progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_with_the_time_left_now_and_then(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    seen = []
    for item in Progress().track(range(40), "statistics", unit="layer"):
        clock[0] += 2
        seen.append(item)
    assert seen == list(range(40))
    assert log.getvalue().splitlines() == ["statistics: 15/40 layers, 50 s left", "statistics: 30/40 layers, 20 s left"]


def test_a_short_loop_leaves_the_log_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    assert list(Progress().track([1, 2], "windows")) == [1, 2]
    assert log.getvalue() == ""


def test_a_total_may_grow_or_be_unknown(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress().bar(0, "tasks", "token") as bar:
        clock[0] += 31
        bar.update(5)
        bar.total += 10
        clock[0] += 31
        bar.update(1)
    assert log.getvalue().splitlines() == ["tasks: 5 tokens", "tasks: 6/10 tokens, 41 s left"]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(Progress().track([1, 2], "windows")) == [1, 2]
    assert "windows:" in terminal.getvalue() and "\r" in terminal.getvalue()


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_quiet_is_silent(
    stream: type[io.StringIO], clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    for _ in Progress(quiet=True).track(range(3), "windows"):
        clock[0] += 60
    Progress(quiet=True).say("a line")
    assert sys.stderr.getvalue() == "" and capsys.readouterr().out == ""


def test_durations_read_well() -> None:
    assert [duration(seconds) for seconds in (0.4, 59, 61, 3599, 11100)] == [
        "0 s",
        "59 s",
        "1 min",
        "1 h 00 min",
        "3 h 05 min",
    ]
