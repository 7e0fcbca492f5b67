"""SIGTERM is the same as Ctrl-C: the error record is left, and the process is gone within seconds."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import modegpt.run
from modegpt.cli.main import main
from modegpt.termination import Terminated, heeding_sigterm, last_words
from tests.small_run import small

STUCK = """
import hashlib, sys
from modegpt.termination import heeding_sigterm, last_words

with heeding_sigterm(0.2), last_words(lambda error: print("last words:", error, flush=True)):
    print("at work", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # many minutes without a look at signals
"""


def ticks_at_work(pid: int) -> int:
    """Processor time of a process, in clock ticks."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def test_a_process_that_hears_no_signal_is_ended_with_its_last_words(repository: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK],
        env=os.environ | {"PYTHONPATH": str(repository)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "at work\n"
    printed = ticks_at_work(process.pid)
    while ticks_at_work(process.pid) < printed + 5:  # by now it is in the product, and not on its way there
        time.sleep(0.01)
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert output == "last words: terminated (SIGTERM)\n" and errors == "error: terminated (SIGTERM)\n"


def test_the_first_one_counts_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    heard: list[BaseException] = []
    with pytest.raises(Terminated), heeding_sigterm(), last_words(heard.append):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # while the first is heeded
    assert [type(error) for error in heard] == [Terminated] and isinstance(heard[0], KeyboardInterrupt)
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before


def test_another_thread_may_use_it() -> None:
    failures: list[BaseException] = []

    def use() -> None:
        try:
            with heeding_sigterm():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated (SIGTERM)")],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_run_leaves_its_error_record(
    number: signal.Signals,
    code: int,
    said: str,
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def signalled(*_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(modegpt.run, "compress", signalled)
    text = small(results).calibration.path  # which writes it
    arguments = ["calibration=jsonl", f"calibration.path={text}", "calibration.num_samples=4"]
    arguments += ["calibration.sequence_length=128", "evaluation=none", "quiet=true", f"output.root={results}"]
    assert main(arguments) == code
    assert capsys.readouterr().err == f"error: {said}\n"
    [note] = results.glob("runs/*/error.json")
    content = json.loads(note.read_text(encoding="utf-8"))
    assert content["message"] in (said, "KeyboardInterrupt") and content["stage"] == "start"
