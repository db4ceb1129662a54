"""The report's page, and its table on the terminal."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1150px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px}th,td{border:1px solid #ddd;padding:3px 8px;text-align:right}
th:first-child,td:first-child{text-align:left}tr:nth-child(even){background:#f7f7f7}th{background:#eee}img{max-width:100%}
.wide{overflow-x:auto}"""
NOTE = "Paired bootstrap on the same test samples. Where the interval includes 0, the difference is within noise."


def page(title: str, table: pd.DataFrame, comparisons: pd.DataFrame, pictures: Sequence[tuple[str, Path]]) -> str:
    """One HTML file with everything inside."""
    parts = [f"<h1>FuseChat: {html.escape(title)}</h1><h2>Results</h2>", _wide(table.to_html(index=False, na_rep=""))]
    if len(comparisons):
        parts += [f"<h2>Against the baseline</h2><p>{NOTE}</p>", _wide(comparisons.to_html(index=False))]
    for caption, path in ((html.escape(caption), path) for caption, path in pictures):
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f"<h2>{caption}</h2><img alt='{caption}' src='data:image/png;base64,{data}'>")
    head = f"<meta charset=utf-8><title>FuseChat: {html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en>{head}{''.join(parts)}</html>"


def print_table(frame: pd.DataFrame) -> None:
    """The result table on the terminal: the model and its headline numbers."""
    shown = [c for c in frame.columns if "." not in c and not c.endswith("95 %") and c != "seed"]
    cells = [{column: _cell(line, column) for column in shown} for _, line in frame.iterrows()]
    print_rows(cells, "held-out results, 95 % bootstrap intervals (± half their width)")


def print_rows(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """A table on the terminal; nothing where there are no rows."""
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("model", "metric") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=max(130, Console().width)).print(table)


def _cell(line: Any, column: str) -> str:
    if f"{column} 95 %" not in line:
        return str(line[column])
    low, high = (float(v) for v in str(line[f"{column} 95 %"]).split("–"))
    digits = 1 if "%" in column else 3
    return f"{line[column]:.{digits}f} ±{(high - low) / 2:.{digits}f}"


def _wide(content: str) -> str:
    return f"<div class=wide>{content}</div>"
