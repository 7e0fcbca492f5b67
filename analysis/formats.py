"""A table as Markdown, LaTeX (booktabs) and CSV."""

import csv
import io
from collections.abc import Callable, Sequence

from analysis.cells import Cell, Column
from analysis.tables import Row, Table
from modegpt import escaping
from modegpt.escaping import printable, spreadsheet

NONE = "\N{EN DASH}"
"""What stands for a number that is not there."""
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "%_&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"±": r"$\pm$", "ö": r"\"o", NONE: "--"}
)
MARKDOWN_MARKS = {"": "{}", "best": "**{}**", "second": "*{}*"}
LATEX_MARKS = {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"}


def shown(cell: Cell, column: Column) -> str:
    """The number in print: mean ± sample standard deviation (n); a dash where there is none."""
    if cell.mean is None:
        return cell.refused or NONE
    text = value(cell.mean, column.digits)
    return text if cell.spread is None else f"{text} ± {value(cell.spread, column.digits)} ({len(cell.values)})"


def value(number: float, digits: int) -> str:
    """A number in print, in powers of ten where it is very large."""
    return f"{number:.2e}" if abs(number) >= 1e5 else f"{number:,.{digits}f}"


def markdown(table: Table) -> str:
    """Title, notes, numbers and what is missing, as Markdown."""
    missing = [f"- Missing: {beside_code(each)}" for each in table.missing]
    lines = [f"### {escaping.markdown(table.title)}", "", *table.notes, "", pipe_table(table), "", *missing]
    return "\n".join(lines).rstrip() + "\n"


def pipe_table(table: Table) -> str:
    """The numbers as a Markdown table with one row of headings; a block that has a heading begins with it, in bold."""
    width = len(table.headings) + len(table.columns)
    lines = [
        pipes([*table.headings, *(column.label for column in table.columns)]),
        pipes(["---"] * len(table.headings) + ["---:"] * len(table.columns)),
    ]
    for heading, rows in table.blocks:
        lines += [_piped([f"**{escaping.markdown(heading)}**", *[""] * (width - 1)])] if heading else []
        labels = [[*map(escaping.markdown, row.labels)] for row in rows]
        numbers = [_numbers(table, row, MARKDOWN_MARKS, escaping.markdown) for row in rows]
        lines += [_piped([*left, *right]) for left, right in zip(labels, numbers, strict=True)]
    return "\n".join(lines)


def latex(table: Table) -> str:
    """A ``table`` environment for booktabs."""
    width = len(table.headings) + len(table.columns)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex(table.caption)}}}",
        rf"\label{{tab:{table.name}}}",
    ]
    lines += [rf"\begin{{tabular}}{{{'l' * len(table.headings)}{'r' * len(table.columns)}}}", r"\toprule"]
    lines += [_row([_latex(text) for text in (*table.headings, *(column.label for column in table.columns))])]
    for heading, rows in table.blocks:
        lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{_latex(heading)}}}}} \\"]
        lines += [_row([*map(_latex, row.labels), *_numbers(table, row, LATEX_MARKS, _latex)]) for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def tidy_csv(table: Table) -> str:
    """One line a number: where it stands, mean, spread, n, and the records it comes from."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["block", *table.headings, "quantity", "mean", "sample_standard_deviation", "n", "refused", "records"]
    )
    for heading, rows in table.blocks:
        for row in rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                numbers = ["" if number is None else repr(number) for number in (cell.mean, cell.spread)]
                place = [heading, *row.labels, column.label]
                rest = [*numbers, len(cell.values), cell.refused or "", " ".join(cell.records)]
                writer.writerow(map(spreadsheet, [*place, *rest]))
    return out.getvalue()


def pipes(cells: Sequence[str]) -> str:
    """One row of a Markdown table."""
    return _piped([*map(escaping.markdown, cells)])


def beside_code(text: str) -> str:
    """Markdown of a sentence with code between backticks."""
    parts = text.split("`")
    return "`".join(
        part.replace("<", "&lt;") if index % 2 else escaping.markdown(part) for index, part in enumerate(parts)
    )


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _numbers(table: Table, row: Row, marks: dict[str, str], escape: Callable[[str], str]) -> list[str]:
    return [
        marks[mark].format(escape(shown(cell, column)))
        for cell, column, mark in zip(row.cells, table.columns, row.marks, strict=True)
    ]


def _latex(text: str) -> str:
    return printable(text).translate(LATEX)


def _row(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"
