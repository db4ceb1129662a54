"""Evaluation files of one or several experiments as rows, tables and paired comparisons."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.app.errors import UserError
from fusechat.app.sealed import unsealed
from fusechat.report.statistics import compare, interval

if TYPE_CHECKING:
    import pandas as pd

ORDER = {"models": 0, "targets": 1, "merged": 2}
KIND = {"models": "pivot and sources", "targets": "targets", "merged": "merged models"}
MOST_SKILLS = 12  # tags of the test chats that tables and figures show; of more (packages, topics) `compare` tells
LOWER_IS_BETTER = ("bits_per_byte", "nats_per_token")


def read_result(path: Path) -> dict[str, Any]:
    """A result file of evaluate or judge. Raises `UserError` where it is half-written or something else."""
    content = unsealed(path.read_bytes(), path, "remove it and evaluate again")
    if not isinstance(content, dict) or not {"samples", "metrics"} <= set(content):
        raise UserError(f"{path} has no samples; give a file that python -m fusechat.evaluate has written")
    return content


def collect(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Every evaluation under the folders, by label. A file that is cut short is an error that names it."""
    rows = []
    for label, folder in folders.items():
        for file in sorted((folder / "evaluation").glob("*.json")):
            content = read_result(file)
            rows.append({**content, "folder": label, "result": file, "kind": _kind(content)})
        for file in sorted((folder / "evaluation").glob("lm_eval/*.json")):  # shown beside the model's own
            content = read_result(file)
            own = (r for r in rows if r["model"] == content["model"] and r["folder"] == label)
            row = next(own, None)
            if row is not None:
                row["others"] = row.get("others", {}) | content["metrics"]
    return rows


def _kind(result: Mapping[str, Any]) -> str:
    """What a model is to its experiment, whose config names pivot and sources: these lie wherever a person has them."""
    config = result.get("config", {})
    given = [config.get("pivot", {}).get("path"), *(config.get("models") or {}).values()]
    return "models" if result["model"] in given else str(result["name"].split("-")[0])


def results_of(folder: Path, model: Path) -> list[dict[str, Any]]:
    """Every result of a model in a folder of evaluations."""
    found = [read_result(file) for file in sorted([*folder.glob("*.json"), *folder.glob("lm_eval/*.json")])]
    return [content for content in found if Path(content["model"]).resolve() == model.resolve()]


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


def few(tags: Iterable[str]) -> list[str]:
    """The tags in their order; none where they are more than a reader can look at."""
    found = sorted({*tags} - {"", "all"})
    return found if len(found) <= MOST_SKILLS else []


def short(name: str) -> str:
    """An evaluation's name as tables and figures show it."""
    told = {"models": "", "targets": "target ", "merged": "merged "}  # folders; my_models is one's own
    return re.sub(r"(?<!\w)(models|targets|merged)-", lambda folder: told[folder[1]], name)


def has(sample: dict[str, Any], name: str) -> bool:
    """Whether a sample has what a metric needs."""
    needed = {"bits_per_byte": "nats", "nats_per_token": "nats", "accuracy": "correct", "next_token_accuracy": "hits"}
    return needed.get(name, name) in sample


def compared(first: dict[str, Any], second: dict[str, Any]) -> pd.DataFrame:
    """Two result files: second - first per metric and skill, paired. Raises `UserError` for different test sets."""
    import pandas as pd

    names = [name for name in first["metrics"] if name in second["metrics"]]
    if not names:
        theirs = " / ".join(", ".join(result["metrics"]) for result in (first, second))
        raise UserError(f"the two results share no metric ({theirs})")
    lines = []
    for name in names:
        for tag, entry in first["metrics"][name].items():
            pair = [[s for s in r["samples"] if has(s, name) and tag in ("all", s["tag"])] for r in (first, second)]
            other = second["metrics"][name].get(tag, {}).get("value")
            values = {"metric": name, "skill": tag, "first": entry["value"], "second": other}
            found = compare(pair[0], pair[1], name)
            lines.append(values | found | {"within noise": found["low"] <= 0 <= found["high"]})
    return pd.DataFrame(lines).round(4)


def ordered(rows: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Models first, then targets, then merged models, each from worst to best."""
    known = sorted({name for row in rows for name in row["metrics"]})
    if metric not in known:
        raise UserError(f"report.metric={metric!r} is in no evaluation; use one of: {', '.join(known)}")
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return sorted(rows, key=lambda row: (ORDER.get(row["kind"], 3), sign * row["metrics"][metric]["all"]["value"]))


def by_experiment(rows: list[dict[str, Any]], labels: Sequence[str]) -> list[dict[str, Any]]:
    """The same rows, experiment after experiment, so that each has its place and colour in every figure."""
    return sorted(rows, key=lambda row: list(labels).index(row["folder"]))


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table of a frame."""
    header = "| " + " | ".join(map(str, frame.columns)) + " |\n|" + "---|" * len(frame.columns) + "\n"
    cells = frame.astype(object).where(frame.notna(), "")
    return header + "".join("| " + " | ".join(map(str, line)) + " |\n" for line in cells.itertuples(index=False))
