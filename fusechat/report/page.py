"""The report's page, and its table on the terminal."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.report.answers import section

if TYPE_CHECKING:
    import pandas as pd

    from fusechat.report.pictures import Picture

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 1.5em auto; padding: 0 1em;
  color: #1a1a1a; background: #fff }
table { border-collapse: collapse; font-size: 13px }
th, td { border: 1px solid #ccc; padding: 3px 8px; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
tr:nth-child(even) { background: #f6f6f6 }
th { background: #eaeaea }
.wide { overflow-x: auto }
.wide svg { width: 100%; height: auto }
figure { margin: 0 0 2em }
figcaption, .note { color: #444; max-width: 70ch }
.said { font-size: 1.1em; border-left: 4px solid #0072b2; padding-left: .8em; max-width: 75ch }
.asked p, dd { white-space: pre-wrap; overflow-wrap: anywhere }
.asked p { font-weight: 600; max-width: 90ch }
.asked dl { display: grid; grid-template-columns: minmax(7em, max-content) 1fr; gap: .2em 1em; font-size: 13px }
dt { color: #444; overflow-wrap: anywhere } dd { margin: 0; font-family: ui-monospace, monospace }
footer { color: #444; font-size: .85em; overflow-wrap: anywhere }
@media print { .wide { overflow: visible } .wide svg { min-width: 0 !important } figure { break-inside: avoid } }
"""
TABLE = "A row a model: pivot and sources first, then targets, then merged models, each from worst to best. "
TABLE += "Intervals are bootstraps over the test chats. {}"
TABLE += "The last columns are settings that differ. Numbers: <a href='results.csv'>results.csv</a>."
ACCURACY = "Accuracy is the share of exact answers, of all and by skill. "
PACKAGES = ("fusechat", "torch", "transformers", "lightning")


def page(
    title: str,
    said: str,
    table: pd.DataFrame,
    cost: pd.DataFrame,
    pictures: Sequence[Picture],
    answered: pd.DataFrame,
    about: str,
) -> str:
    """One HTML file that asks no other host. said: the conclusion; answered: of `answers`; about: see `made_from`."""
    name = html.escape(f"FuseChat: {title}")
    parts = [f"<h1>{name}</h1>"]
    parts += [f"<p class=said>{html.escape(said)}</p>"] if said else []
    figures = [_figure(picture) for picture in pictures]
    note = TABLE.format(ACCURACY if any("accuracy" in str(column) for column in table.columns) else "")
    results = ["<h2>Results</h2>", _wide(table.to_html(index=False, na_rep="")), f"<p class=note>{note}</p>"]
    parts += [*figures[:1], *results, *figures[1:], section(answered)]
    if len(cost):
        told = "Optimizer steps of each target and tokens a second at the median step, on the machine that trained it."
        shown = _wide(cost.to_html(index=False, na_rep=""))
        parts.append(f"<h2>Cost</h2>{shown}<p class=note>{told} Numbers: <a href='cost.csv'>cost.csv</a>.</p>")
    parts.append(f"<footer>{about}</footer>")
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
    head += f"<title>{name}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>"


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


def _figure(picture: Picture) -> str:
    """An SVG under its heading, with caption and the file that holds its numbers."""
    title, caption = html.escape(picture.title), html.escape(picture.caption)
    natural = round(float(picture.svg.partition('width="')[2].partition("pt")[0]) * 4 / 3)  # pixels
    size = f"style='max-width:{round(1.3 * natural)}px;min-width:{min(620, natural)}px'"
    told = f"role='img' aria-label='{title}' data-name='{picture.name}' {size}"
    drawing = picture.svg.replace("<svg", f"<svg {told}", 1)
    numbers = f"<a href='{picture.name}.csv'>{picture.name}.csv</a>"
    return f"<h2>{title}</h2><figure>{_wide(drawing)}<figcaption>{caption} Numbers: {numbers}.</figcaption></figure>"


def made_from(places: Mapping[str, Path], made_by: str) -> str:
    """What made the page, and of when the results are: the same results give the same page. made_by: the command."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    files = [file for folder in places.values() for file in (folder / "evaluation").glob("**/*.json")]
    latest = max((file.stat().st_mtime for file in files), default=0.0)
    told = f"Evaluations of {datetime.fromtimestamp(latest, UTC):%Y-%m-%d %H:%M} UTC at the latest, from "
    told += ", ".join(f"<code>{html.escape(str(folder))}</code>" for folder in places.values())
    command = f" by <code>{html.escape(made_by)}</code>" if made_by else ""
    return f"{told}. Made with {html.escape(versions)}{command}."


def _cell(line: Any, column: str) -> str:
    if line[column] != line[column]:  # not measured
        return ""
    if f"{column} 95 %" not in line:
        return str(line[column])
    low, high = (float(v) for v in str(line[f"{column} 95 %"]).split("–"))
    digits = 1 if "%" in column else 3
    return f"{line[column]:.{digits}f} ±{(high - low) / 2:.{digits}f}"


def _wide(content: str) -> str:
    return f"<div class=wide>{content}</div>"
