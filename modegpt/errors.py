"""The one exception that is the user's to fix, and how a small command ends by it."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A bad input: one line that says what was wrong, where, and what would be right."""


def exit_status(command: Callable[[], object], *, program: str = "") -> int:
    """Run ``command``; returns 0, or 2 after a mistake of the user.

    The mistake is said in one line on standard error, led by the name of the ``program``.
    """
    try:
        command()
    except UserError as error:
        print(f"{program}: error: {error}" if program else f"error: {error}", file=sys.stderr)
        return 2
    return 0
