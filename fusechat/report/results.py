"""Evaluation files of one or several experiments as rows, tables and paired comparisons."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fusechat.app.errors import UserError
from fusechat.report.statistics import compare, interval

ORDER = {"models": 0, "targets": 1, "merged": 2}
SWEPT = {
    "train": ("loss", "fusion", "optimizer", "token_map", "alignment", "data", "lora", "seed"),
    "merge": ("merge",),
}
LOWER_IS_BETTER = ("bits_per_byte", "nats_per_token")


def read_result(path: Path) -> dict[str, Any]:
    """A result file of evaluate or judge. Raises `UserError` where it is half-written or something else."""
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is half-written; remove it and evaluate again") from error
    if not isinstance(content, dict) or not {"samples", "metrics"} <= set(content):
        raise UserError(f"{path} has no samples; give a file that python -m fusechat.evaluate has written")
    return content


def collect(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Every evaluation under the folders. A file that is cut short is an error that names it."""
    rows = []
    for folder in folders:
        for file in sorted((folder / "evaluation").glob("*.json")):
            content = read_result(file)
            rows.append({**content, "folder": folder, "kind": content["name"].split("-")[0]})
        for file in sorted((folder / "evaluation").glob("lm_eval/*.json")):  # shown beside the model's own
            content = read_result(file)
            row = next((r for r in rows if r["model"] == content["model"]), None)
            if row is not None:
                row["others"] = row.get("others", {}) | content["metrics"]
    return rows


def metrics(samples: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """metric -> skill (``all`` first) -> value with interval, over the samples that have the metric."""
    found = {}
    for name in names:
        having = [s for s in samples if has(s, name)]
        groups = {"all": having} | {
            tag: [s for s in having if s["tag"] == tag] for tag in sorted({s["tag"] for s in having if s["tag"]})
        }
        found[name] = {tag: interval(part, name) for tag, part in groups.items()}
    return found


def has(sample: dict[str, Any], name: str) -> bool:
    """Whether a sample has what a metric needs."""
    return {"bits_per_byte": "nats", "nats_per_token": "nats", "accuracy": "correct"}.get(name, name) in sample


def compared(first: dict[str, Any], second: dict[str, Any]) -> pd.DataFrame:
    """Two result files: second - first per metric and skill, paired. Raises `UserError` where they are of different test sets."""
    names = [name for name in first["metrics"] if name in second["metrics"]]
    if not names:
        raise UserError(
            f"the two results share no metric ({', '.join(first['metrics'])} / {', '.join(second['metrics'])})"
        )
    lines = []
    for name in names:
        for tag in first["metrics"][name]:
            pair = [[s for s in r["samples"] if has(s, name) and tag in ("all", s["tag"])] for r in (first, second)]
            found = compare(pair[0], pair[1], name)
            within = found["low"] <= 0 <= found["high"]
            values = {
                "first": first["metrics"][name][tag]["value"],
                "second": second["metrics"][name].get(tag, {}).get("value"),
            }
            lines.append({"metric": name, "skill": tag, **values, **found, "within noise": within})
    return pd.DataFrame(lines).round(4)


def ordered(rows: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Models first, then targets, then merged models, each from worst to best."""
    known = sorted({name for row in rows for name in row["metrics"]})
    if metric not in known:
        raise UserError(f"report.metric={metric!r} is in no evaluation; use one of: {', '.join(known)}")
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return sorted(rows, key=lambda row: (ORDER.get(row["kind"], 3), sign * row["metrics"][metric]["all"]["value"]))


def table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row a model: bits per byte and accuracy with 95 % intervals, then accuracy by skill, then the overrides that differ."""
    several = len({row["folder"] for row in rows}) > 1
    differing = _differing(rows)
    out = []
    for row in rows:
        line: dict[str, Any] = {"experiment": str(row["folder"])} if several else {}
        line["model"] = row["name"].replace("models-", "").replace("targets-", "target ").replace("merged-", "merged ")
        for name, title in (("bits_per_byte", "bits per byte"), ("accuracy", "accuracy %")):
            if name in row["metrics"]:
                scale, digits = (100, 1) if name == "accuracy" else (1, 4)
                entry = row["metrics"][name]["all"]
                line[title] = round(entry["value"] * scale, digits)
                line[f"{title} 95 %"] = f"{entry['low'] * scale:.{digits}f}–{entry['high'] * scale:.{digits}f}"
        line |= {name: round(entry["all"]["value"], 4) for name, entry in row.get("others", {}).items()}
        by_skill = row["metrics"].get("accuracy", {})
        line |= {tag: round(100 * entry["value"], 1) for tag, entry in by_skill.items() if tag != "all"}
        out.append(line | {key: _value(row, key) for key in differing})
    return pd.DataFrame(out)


def comparisons(rows: Sequence[dict[str, Any]], baseline: str, metric: str) -> pd.DataFrame:
    """Every model against the baseline, paired on the same samples: difference, interval, p, and whether it is within noise."""
    base = next((row for row in rows if row["name"] == baseline), rows[0])
    out = []
    for row in rows:
        if row is base or row["tests"] != base["tests"]:
            continue
        found = compare(base["samples"], row["samples"], metric)
        within = found["low"] <= 0 <= found["high"]
        line = {"model": row["name"], "against": base["name"], "metric": metric}
        out.append({**line, **{k: round(v, 4) for k, v in found.items()}, "within noise": within})
    return pd.DataFrame(out)


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table of a frame."""
    header = "| " + " | ".join(map(str, frame.columns)) + " |\n|" + "---|" * len(frame.columns) + "\n"
    cells = frame.astype(object).where(frame.notna(), "")
    return header + "".join("| " + " | ".join(map(str, line)) + " |\n" for line in cells.itertuples(index=False))


def _differing(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Config keys whose values differ between the runs that made the models, of those that people sweep at that stage."""
    keys = sorted({key for row in rows for key in _made(row)})
    return [key for key in keys if len({str(made[key]) for row in rows if key in (made := _made(row))}) > 1]


def _made(row: dict[str, Any]) -> dict[str, Any]:
    """The flat config of the stage that made a model, as far as people sweep it."""
    if "made" not in row:
        file = Path(row["model"]) / "fusechat.json"
        content = json.loads(file.read_text()) if file.exists() else {}
        flat = dict(_flat(content.get("config", {}), ""))
        row["made"] = {
            k: v
            for k, v in flat.items()
            if k.split(".")[0] in SWEPT.get(content.get("stage", ""), ()) and k != "merge.name"
        }
    return row["made"]  # type: ignore[no-any-return]


def _value(row: dict[str, Any], key: str) -> Any:
    return _made(row).get(key, "")


def _flat(tree: Any, prefix: str) -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [pair for key, value in tree.items() for pair in _flat(value, f"{prefix}.{key}" if prefix else key)]
