"""Progress: bars on a terminal, few lines in a log, silence on request."""

import io
import sys

import pytest

import modegpt.progress
from modegpt.progress import Course, Progress, duration


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


def test_a_loop_says_which_model_it_scores(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for label in ("dense", "compressed"):
        for _ in Progress().of(label).track(range(2), "perplexity, windows of 2048", unit="window"):
            clock[0] += 30
    assert [line.partition(": 1/2")[0] for line in log.getvalue().splitlines()] == [
        "dense: perplexity, windows of 2048",
        "dense: perplexity, windows of 2048: 2/2 windows, 0 s left",
        "compressed: perplexity, windows of 2048",
        "compressed: perplexity, windows of 2048: 2/2 windows, 0 s left",
    ]


def test_the_whole_run_is_estimated_once_two_stages_are_known(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    progress = Progress(course=Course(("dense", "compressed")))

    def loop(progress: Progress, description: str, seconds: float) -> str:
        """The first line of a loop of ten steps."""
        log.truncate(0)
        log.seek(0)
        for _ in progress.track(range(10), description):
            clock[0] += seconds
        return log.getvalue().partition("\n")[0]

    assert loop(progress.of("dense"), "perplexity", 30) == "dense: perplexity: 1/10 its, 4 min left"
    assert "run" not in loop(progress.of("dense"), "zero-shot tasks", 90), "scoring is one stage, with two loops"
    assert "run" not in loop(progress, "statistics", 60), "the dense scoring is all that is known"
    # 10 min of it left, and the compressed model's scores as the dense one's: 5 + 15 min
    assert loop(progress, "decomposition", 60) == "decomposition: 1/10 its, 9 min left; run: 29 min left"
    # 4.5 min of the loop left, and the tasks after it
    scoring = progress.of("compressed")
    assert loop(scoring, "perplexity", 30) == "compressed: perplexity: 1/10 its, 4 min left; run: 20 min left"
    assert loop(scoring, "zero-shot tasks", 90).endswith("14 min left; run: 14 min left")


def test_a_run_with_something_unknown_ahead_is_not_estimated() -> None:
    trained = Course(("dense", "compressed", "recovery", "recovered"), {"dense": 60.0, "statistics": 5.0})
    assert trained.left("decomposition", elapsed=1, left=10) is None, "how long training takes is not known yet"
    trained.add("compressed", 50.0)
    assert trained.left("recovery", elapsed=1, left=10) == 70
    reused = Course(("dense", "compressed"), {"statistics": 5.0, "decomposition": 7.0})
    assert reused.left("compressed", elapsed=1, left=10) is None, "the dense scores were reused, their time is unknown"


def test_a_bar_shows_the_whole_run_too(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    course = Course(("dense", "compressed"), {"dense": 60.0, "statistics": 5.0})
    with Progress(course=course).bar(4, "decomposition", "layer") as bar:
        clock[0] += 10
        bar.update()
        bar.refresh()
    assert "decomposition:" in terminal.getvalue() and "run: 2 min left" in terminal.getvalue()
    assert course.seconds["decomposition"] == 10


def test_durations_read_well() -> None:
    assert [duration(seconds) for seconds in (0.4, 59, 61, 3599, 11100)] == [
        "0 s",
        "59 s",
        "1 min",
        "1 h 00 min",
        "3 h 05 min",
    ]
