"""SIGTERM, which a cluster sends at the time limit, ends a process as Ctrl-C does, and within seconds."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE_SECONDS = 10.0
"""Until the process is ended from outside of its main thread. SLURM kills after 30 s."""
EXIT_CODE = 128 + signal.SIGTERM

_last_words: list[Callable[[BaseException], None]] = []


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""

    def __init__(self) -> None:
        super().__init__("terminated (SIGTERM)")


@contextmanager
def last_words(say: Callable[[BaseException], None]) -> Iterator[None]:
    """``say`` hears of an exception or interruption of the block, which then goes on its way."""
    _last_words.append(say)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        say(error)
        raise
    finally:
        _last_words.remove(say)


@contextmanager
def heeding_sigterm(grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """In the block, the first SIGTERM raises `Terminated` in the main thread; later ones are ignored.

    A main thread that computes a long product hears of no signal. After ``grace_seconds`` another thread says the last
    words in its place and ends the process. Off the main thread the block is like any other.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    told, tell = socket.socketpair()
    tell.setblocking(False)
    left = threading.Event()
    before, fd_before = signal.signal(signal.SIGTERM, stop), signal.set_wakeup_fd(tell.fileno())
    threading.Thread(target=_watch, args=(told, left, grace_seconds), daemon=True).start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(fd_before)
        signal.signal(signal.SIGTERM, before)
        tell.close()


def _watch(told: socket.socket, left: threading.Event, grace_seconds: float) -> None:
    """Wait for a SIGTERM, and then for the end of the block."""
    with told:
        while (number := told.recv(1)) not in (b"", bytes([signal.SIGTERM])):
            pass
    if number and not left.wait(grace_seconds):
        error = Terminated()
        for say in reversed(_last_words):
            say(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)
