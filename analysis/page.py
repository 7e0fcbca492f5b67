"""The report as one HTML file that needs nothing beside it."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis import orderings
from analysis.formats import figure as number
from analysis.formats import html_table
from analysis.published import Beside
from analysis.runs import Refusal, Run
from analysis.tables import Table

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:72rem;margin:0 auto;padding:1rem 1.2rem 4rem}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin:2.5rem 0 .4rem;border-bottom:1px solid #ccc}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;margin:.6rem 0}
th,td{padding:.2rem .6rem;text-align:right;white-space:nowrap}th[scope=row],thead th:first-child,.left td,.left th{text-align:left}
thead th{border-top:2px solid #1a1a1a;border-bottom:1px solid #1a1a1a}tbody{border-bottom:2px solid #1a1a1a}
th[scope=row]{font-weight:400}tr.block th{text-align:left;border-top:1px solid #999;font-style:italic;font-weight:400}
tbody tr:hover{background:#f3f6fa}figure{margin:1rem 0}img{max-width:100%;height:auto}
p.note,li.note,figcaption{color:#444;font-size:.85rem}li.missing{color:#8a3b00;font-size:.85rem;overflow-wrap:anywhere}
nav ul{columns:2;font-size:.9rem}details{font-size:.8rem}details li{overflow-wrap:anywhere}code{font-size:.9em}
@media(max-width:40rem){nav ul{columns:1}}
"""


@dataclass(frozen=True)
class Picture:
    """A figure on disk."""

    name: str
    title: str
    png: Path


def page(
    *,
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    compared: Sequence[tuple[str, str, Sequence[Beside]]],
    orders: Sequence[orderings.Ordering],
    absent: Sequence[tuple[str, str]],
    runs: Sequence[Run],
    refused: Sequence[Refusal],
) -> str:
    """The whole document. ``absent``: declared tables and figures without any record, with the command that fills them."""
    sections = [(f"table-{table.name}", table.title, _table(table)) for table in tables]
    sections += [(f"figure-{picture.name}", f"Figure: {picture.title}", _picture(picture)) for picture in pictures]
    sections += [(name, f"Published beside ours: {title}", _compared(rows)) for name, title, rows in compared]
    sections += [("published_orderings", "Published orderings of methods, and ours", _orders(orders))]
    sections += [("absent", "Not run yet", _absent(absent))] if absent else []
    sections += [("refused", "Records left out", _refused(refused))] if refused else []
    sections += [("records", "Records", _records(runs))]
    index = "".join(f'<li><a href="#{name}">{html.escape(title)}</a></li>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{html.escape(title)}</h2>{content}</section>' for name, title, content in sections
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>MoDeGPT: results</title><style>{STYLE}</style></head><body><h1>MoDeGPT: results</h1>"
        f"<p>{len(runs)} records. Rates are shares of the block-linear weights. Point at a number for its records; the CSV of each table lists them too.</p>"
        f"<nav><ul>{index}</ul></nav>{body}</body></html>\n"
    )


def _table(table: Table) -> str:
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in table.notes)
    missing = "".join(f'<li class="missing">Missing: {html.escape(each)}</li>' for each in table.missing)
    paths = dict.fromkeys(
        path for _, rows in table.blocks for row in rows for cell in row.cells for path in cell.records
    )
    origin = "".join(f"<li>{html.escape(path)}</li>" for path in paths)
    details = f"<details><summary>Records behind this table: {len(paths)}</summary><ul>{origin}</ul></details>"
    return f'{notes}<div class="scroll">{html_table(table)}</div><ul>{missing}</ul>{details}'


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png.read_bytes()).decode()
    return f'<figure><img alt="{html.escape(picture.title)}" src="data:image/png;base64,{data}"></figure>'


def _compared(rows: Sequence[Beside]) -> str:
    heads = (
        "Model",
        "Method",
        "Rate (%)",
        "Calibration",
        "Metric",
        "Window",
        "Published",
        "Ours",
        "Difference",
        "Table, source (confidence)",
    )
    body = []
    for each in rows:
        it = each.published
        ours = "–" if each.ours.mean is None else number(each.ours.mean, 2)
        difference = "–" if each.difference is None else f"{each.difference:+.2f}"
        cells = (
            it.model,
            it.method,
            it.rate,
            it.calibration,
            it.metric,
            it.window or "–",
            it.value,
            ours,
            difference,
            f"{it.table}: {it.source} ({it.confidence})",
        )
        body.append("".join(f"<td>{html.escape(text)}</td>" for text in cells))
    return _plain(heads, body)


def _orders(orders: Sequence[orderings.Ordering]) -> str:
    lines = ["".join(f"<td>{html.escape(text)}</td>" for text in row) for row in orderings.rows(orders)]
    return f'<p class="note">{html.escape(orderings.tally(orders))}</p>{_plain(orderings.HEADINGS, lines)}'


def _absent(absent: Sequence[tuple[str, str]]) -> str:
    return (
        "<ul>"
        + "".join(
            f'<li class="missing">{html.escape(title)}: <code>{html.escape(command)}</code></li>'
            for title, command in absent
        )
        + "</ul>"
    )


def _refused(refused: Sequence[Refusal]) -> str:
    return _plain(
        ("Record", "Reason"),
        [f"<td>{html.escape(each.path)}</td><td>{html.escape(each.reason)}</td>" for each in refused],
    )


def _records(runs: Sequence[Run]) -> str:
    keys: dict[tuple, int] = {}
    for run in runs:
        facts = run.facts
        key = (
            facts["experiment"],
            facts["model"],
            (facts["commit"] or "none")[:10],
            "changed since" if facts["dirty"] else "clean",
            str(run.record["provenance"]["hardware"].get("cpu")),
        )
        keys[key] = keys.get(key, 0) + 1
    rows = [
        "".join(f"<td>{html.escape(text)}</td>" for text in (*key, str(count))) for key, count in sorted(keys.items())
    ]
    return _plain(("Experiment", "Model", "Commit", "Code", "Processor", "Records"), rows)


def _plain(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    return f'<div class="scroll"><table class="left"><thead><tr>{head}</tr></thead><tbody>{"".join(f"<tr>{row}</tr>" for row in rows)}</tbody></table></div>'
