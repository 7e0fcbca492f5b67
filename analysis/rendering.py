"""Pages from the templates in ``templates/``."""

import html
import textwrap
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from modegpt.escaping import markdown, printable

COLUMNS = 112
"""Width of Markdown source."""

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).resolve().parent / "templates"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters["fill"] = lambda text: textwrap.fill(
    str(text), COLUMNS, break_long_words=False, break_on_hyphens=False
)
_ENVIRONMENT.filters["cell"] = lambda text: html.escape(printable(str(text)), quote=False)
_ENVIRONMENT.filters["markdown"] = lambda text: markdown(str(text))


def render(template: str, **values: Any) -> str:
    """The template filled with ``values``. HTML is escaped; a name that the template lacks a value for is an error."""
    return _ENVIRONMENT.get_template(template).render(**values)
