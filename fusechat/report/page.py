"""The report's figures and page."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from fusechat.report import figures

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1150px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px}th,td{border:1px solid #ddd;padding:3px 8px;text-align:right}
th:first-child,td:first-child{text-align:left}tr:nth-child(even){background:#f7f7f7}th{background:#eee}img{max-width:100%}
.wide{overflow-x:auto}"""


def figures_of(folders: Sequence[Path], rows: Sequence[dict[str, Any]], output: Path) -> list[tuple[str, Path]]:
    """Draws what the folders allow; title and file of each figure."""
    names = [_short(row["name"]) for row in rows]
    found = [
        (
            "Results: held-out bits per byte",
            figures.result_bars(
                names, [row["metrics"]["bits_per_byte"]["all"] for row in rows], output / "results.png"
            ),
        )
    ]
    if all("accuracy" in row["metrics"] for row in rows):
        found.append(
            (
                "Accuracy per skill, 95 % intervals",
                figures.skill_bars(names, [row["metrics"]["accuracy"] for row in rows], output / "skills.png"),
            )
        )
    targets = {
        file.parent.name: json.loads(file.read_text())
        for folder in folders
        for file in sorted(folder.glob("targets/*/fusechat.json"))
    }
    curves = {name: curve for folder in folders for name, curve in training_curves(folder).items()}
    if curves:
        found.append(("Training curves", figures.curves(curves, output / "training.png")))
    fused = {name: made for name, made in targets.items() if made["sources"]}
    if fused:
        found.append(
            (
                "Who spoke for how many response tokens",
                figures.wins({n: m["wins"] for n, m in fused.items()}, output / "wins.png"),
            )
        )
    stores = {
        file.parent.name: json.loads(file.read_text())
        for folder in folders
        for file in sorted(folder.glob("aligned/*/manifest.json"))
    }
    if stores:
        found.append(
            ("Alignment: how pivot positions found a partner", figures.alignment(stores, output / "alignment.png"))
        )
    for folder in folders:
        for file in sorted(folder.glob("merged/*/merge_weights.png")):
            copy = output / f"merge_weights_{file.parent.name}.png"
            copy.write_bytes(file.read_bytes())
            found.append((f"Merge weights: {file.parent.name}", copy))
    return found


def training_curves(folder: Path) -> dict[str, pd.DataFrame]:
    """Run name -> its logged metrics, the parts of resumed runs put together."""
    found: dict[str, pd.DataFrame] = {}
    for directory in sorted((folder / "logs").glob("train-*")):
        parts = [pd.read_csv(file) for file in sorted(directory.glob("from_step_*/metrics.csv")) if file.stat().st_size]
        if parts:
            found[directory.name.removeprefix("train-")] = (
                pd.concat(parts).groupby("step", as_index=False).last()
            )  # of each column
    return found


def page(title: str, table: pd.DataFrame, comparisons: pd.DataFrame, pictures: Sequence[tuple[str, Path]]) -> str:
    """One HTML file with everything inside."""
    parts = [
        f"<h1>FuseChat: {html.escape(title)}</h1><h2>Results</h2><div class=wide>{table.to_html(index=False, na_rep='')}</div>"
    ]
    if len(comparisons):
        note = (
            "Paired bootstrap on the same test samples. Where the interval includes 0, the difference is within noise."
        )
        parts.append(
            f"<h2>Against the baseline</h2><p>{note}</p><div class=wide>{comparisons.to_html(index=False)}</div>"
        )
    for caption, path in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f"<h2>{html.escape(caption)}</h2><img alt='{html.escape(caption)}' src='data:image/png;base64,{data}'>"
        )
    head = f"<meta charset=utf-8><title>FuseChat: {html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en>{head}{''.join(parts)}</html>"


def print_table(frame: pd.DataFrame) -> None:
    """The result table on the terminal: the model and its headline numbers."""
    table = Table(title="held-out results, 95 % bootstrap intervals (± half their width)")
    shown = [c for c in frame.columns if "." not in c and not c.endswith("95 %") and c != "seed"]
    for column in shown:
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for _, line in frame.iterrows():
        table.add_row(*(_cell(line, column) for column in shown))
    Console(width=max(130, Console().width)).print(table)


def _cell(line: Any, column: str) -> str:
    if f"{column} 95 %" not in line:
        return str(line[column])
    low, high = (float(v) for v in str(line[f"{column} 95 %"]).split("–"))
    digits = 1 if "%" in column else 3
    return f"{line[column]:.{digits}f} ±{(high - low) / 2:.{digits}f}"


def _short(name: str) -> str:
    return name.replace("models-", "").replace("targets-", "target ").replace("merged-", "merged ")
