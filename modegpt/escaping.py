"""Names and texts of others, as they may stand in what is written for people: whatever they hold stays text."""

import re
from typing import Any

LONGEST = 80
"""Characters of a text in a picture."""
_NUMBER = re.compile(r"[-+]?(\d[\d.,]*(e[-+]?\d+)?( ?%)?)?", re.IGNORECASE)


def printable(text: str) -> str:
    r"""``text`` on one line, with escapes for what a terminal would obey and not show (``\x1b`` for ESC)."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "backslashreplace").decode()
        for character in text
    )


def printable_lines(text: str) -> str:
    """The same of a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def markdown(text: str) -> str:
    """``text`` in a line or a table's cell of Markdown: no HTML, no link, no new cell or line."""
    safe = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", safe)


def spreadsheet(value: Any) -> Any:
    """``value`` in a cell of a CSV file: a text that a spreadsheet would take for a formula is led by an apostrophe."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def drawable(text: str) -> str:
    """``text`` in a picture: no formula of Matplotlib, and no longer than there is room."""
    short = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
    return printable_lines(short).replace("$", r"\$")
