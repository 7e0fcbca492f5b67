"""Names of others stay text wherever they are written."""

import csv
import io

import pandas
import pytest
from matplotlib.figure import Figure

from modegpt.escaping import LONGEST, drawable, markdown, printable, spreadsheet

NAMES = [
    "plain-name_7",
    "<script>alert(1)</script>",
    "[a](javascript:b)",
    "a|b",
    "a\nb",
    "`code`",
    "\x1b[31mred",
    "a&b",
]


def test_printable_is_one_line_that_a_terminal_only_shows() -> None:
    assert printable("a\x1b[2J\x9b\r\nb\u202ec\ud800") == r"a\x1b[2J\x9b\r\nb\u202ec\ud800"
    assert printable("tiny-llama, ± 0.1 é 模型") == "tiny-llama, ± 0.1 é 模型"


@pytest.mark.parametrize("name", NAMES)
def test_markdown_gives_back_the_text_and_nothing_else(name: str) -> None:
    safe = markdown(name)
    unescaped = safe.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    for character in "`*[]|":
        unescaped = unescaped.replace(f"\\{character}", character)
    assert unescaped.replace("\\\\", "\\") == printable(name)
    assert not {"<", "\n", "\x1b"} & set(safe) and "|" not in safe.replace(r"\|", "")


@pytest.mark.parametrize("formula", ["=HYPERLINK(1)", "+1+cmd", "-2+3", "@SUM(1)", "\t=1", "\r=1"])
def test_a_formula_becomes_text(formula: str) -> None:
    assert spreadsheet(formula) == f"'{formula}"


@pytest.mark.parametrize("value", ["a=b", "-0.5", "+3.2e-05", "-", "-12.5 %", "", -0.5, None, True])
def test_what_is_no_formula_is_left_alone(value: object) -> None:
    assert spreadsheet(value) is value


def test_a_frame_with_formulas_is_read_back_as_text() -> None:
    frame = pandas.DataFrame({"name": ["=1+1", "plain"], "value": [-1.5, 2.0]})
    rows = list(csv.reader(io.StringIO(frame.map(spreadsheet).to_csv(index=False))))
    assert rows == [["name", "value"], ["'=1+1", "-1.5"], ["plain", "2.0"]]


@pytest.mark.parametrize("name", [*NAMES, "$", "a$b$c", r"$\frac{", "x" * 300])
def test_any_name_can_be_drawn(name: str) -> None:
    figure = Figure()
    figure.suptitle(drawable(name))
    figure.subplots().set_title(drawable(name))
    figure.savefig(io.BytesIO(), format="png")
    assert len(drawable("x" * 300)) == LONGEST
