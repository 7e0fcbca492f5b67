"""The one exception that is the user's to fix, and how a small command ends by it."""

import io
import sys
import textwrap
from collections.abc import Callable

from modegpt.escaping import printable


class UserError(ValueError):
    """A bad input: one line that says what was wrong, where, and what would be right."""


def shortened(text: str, width: int = 300) -> str:
    """``text`` on one line of at most ``width`` characters, cut between words."""
    return textwrap.shorten(text, width, placeholder=" ...")


def any_terminal() -> None:
    """Let standard output replace a character that the terminal's encoding has not, such as the sign in "1 ± 0.1"."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not what captures it
        sys.stdout.reconfigure(errors="replace")


def exit_status(command: Callable[[], object], *, program: str = "") -> int:
    """Run ``command``; returns 0, or 2 after a mistake of the user.

    The mistake is said in one line on standard error, led by the name of the ``program``.
    """
    any_terminal()
    try:
        command()
    except UserError as error:
        print(printable(f"{program}: error: {error}" if program else f"error: {error}"), file=sys.stderr)
        return 2
    return 0
