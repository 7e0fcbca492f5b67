"""A table as Markdown, LaTeX (booktabs), CSV and HTML."""

import csv
import html
import io
from collections.abc import Sequence

from analysis.cells import Cell, Column
from analysis.tables import Table

MARKS = {
    "markdown": {"": "{}", "best": "**{}**", "second": "*{}*"},
    "latex": {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"},
    "html": {"": "{}", "best": "<b>{}</b>", "second": "<u>{}</u>"},
}
LATEX = str.maketrans({"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "±": r"$\pm$", "ö": r"\"o", "–": "--"})


def shown(cell: Cell, column: Column) -> str:
    """The number in print: mean ± sample standard deviation (n); a dash where there is none."""
    if cell.mean is None:
        return cell.refused or "–"
    text = figure(cell.mean, column.digits)
    return text if cell.spread is None else f"{text} ± {figure(cell.spread, column.digits)} ({len(cell.values)})"


def figure(value: float, digits: int) -> str:
    """A number in print, in powers of ten where it is very large."""
    return f"{value:.2e}" if abs(value) >= 1e5 else f"{value:,.{digits}f}"


def markdown(table: Table) -> str:
    """Markdown with one row of headings; blocks begin with a row in bold."""
    width = len(table.headings) + len(table.columns)
    lines = [f"### {table.title}", "", *table.notes, ""]
    lines += [
        pipes([*table.headings, *(column.label for column in table.columns)]),
        pipes(["---"] * len(table.headings) + ["---:"] * len(table.columns)),
    ]
    for heading, rows in table.blocks:
        lines.append(pipes([f"**{heading}**", *[""] * (width - 1)]))
        lines += [pipes([*row.labels, *_cells(table, row, "markdown")]) for row in rows]
    lines += ["", *(f"- Missing: {each}" for each in table.missing)]
    return "\n".join(lines).rstrip() + "\n"


def latex(table: Table) -> str:
    """A ``table`` environment for booktabs."""
    width = len(table.headings) + len(table.columns)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{table.caption.translate(LATEX)}}}",
        rf"\label{{tab:{table.name}}}",
    ]
    lines += [rf"\begin{{tabular}}{{{'l' * len(table.headings)}{'r' * len(table.columns)}}}", r"\toprule"]
    lines += [_row([text.translate(LATEX) for text in (*table.headings, *(column.label for column in table.columns))])]
    for heading, rows in table.blocks:
        lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{heading.translate(LATEX)}}}}} \\"]
        lines += [_row([*(text.translate(LATEX) for text in row.labels), *_cells(table, row, "latex")]) for row in rows]
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
                numbers = ["" if value is None else repr(value) for value in (cell.mean, cell.spread)]
                writer.writerow(
                    [
                        heading,
                        *row.labels,
                        column.label,
                        *numbers,
                        len(cell.values),
                        cell.refused or "",
                        " ".join(cell.records),
                    ]
                )
    return out.getvalue()


def html_table(table: Table) -> str:
    """A table element; every number carries its records as a tooltip."""
    width = len(table.headings) + len(table.columns)
    head = "".join(
        f"<th>{html.escape(text)}</th>" for text in (*table.headings, *(column.label for column in table.columns))
    )
    body = []
    for heading, rows in table.blocks:
        body.append(f'<tr class="block"><th colspan="{width}">{html.escape(heading)}</th></tr>')
        for row in rows:
            labels = "".join(f'<th scope="row">{html.escape(text)}</th>' for text in row.labels)
            numbers = "".join(
                f'<td title="{html.escape(chr(10).join(cell.records))}">{text}</td>'
                for cell, text in zip(row.cells, _cells(table, row, "html"), strict=True)
            )
            body.append(f"<tr>{labels}{numbers}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _cells(table: Table, row, form: str) -> list[str]:
    escape = {"markdown": str, "latex": lambda text: text.translate(LATEX), "html": html.escape}[form]
    return [
        MARKS[form][mark].format(escape(shown(cell, column)))
        for cell, column, mark in zip(row.cells, table.columns, row.marks, strict=True)
    ]


def pipes(cells: Sequence[str]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _row(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"
