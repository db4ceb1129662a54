"""Every model against a baseline: on one test set by its chats, over several test sets (seeds) by their differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import numpy as np

from fusechat.app.errors import UserError
from fusechat.report.results import KIND, LOWER_IS_BETTER, short
from fusechat.report.statistics import compare, mean_of

if TYPE_CHECKING:
    import pandas as pd

BASELINES = ("targets-sft_[0-9]*", "targets-sft")  # as the pipelines name plain SFT: its shuffles, or a single run
OWN_RUNS = "baseline, run by run"
POOLED = "pooled"
Rows = Sequence[Mapping[str, Any]]


def comparisons(rows: Rows, baseline: str | None, metric: str) -> pd.DataFrame:
    """Every model against the baseline. Several runs of the baseline stand as their mean, chat by chat.

    Columns: experiment, model, kind, against, metric, difference, low and high of its 95 % interval, p, and the
    verdict: better, worse or within noise. On one test set intervals are paired bootstraps over its chats. Where there
    are several, the rows of experiment `POOLED` come first: the mean of a model's differences, with Student's interval
    over the test sets. baseline: an evaluation's name, or a pattern of names; None: the first of `BASELINES` that is
    there, else each test set's first evaluation. Raises `UserError` for a name that is not there.
    """
    import pandas as pd

    names = [row["name"] for row in rows]
    patterns = [baseline] if baseline else BASELINES
    pattern = next((p for p in patterns if any(fnmatchcase(name, p) for name in names)), None)
    if pattern is None and baseline:
        raise UserError(f"report.baseline={baseline!r} is in no evaluation; use one of: {', '.join(names)}")
    sets: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        sets.setdefault(row["tests"], []).append(row)
    found = [_on_one(part, pattern, metric) for part in sets.values()]
    each = pd.DataFrame([line for part in found for line in part])
    pooled = _pooled([part for part in found if part])
    return pd.concat([pd.DataFrame(pooled), each], ignore_index=True).round(4)


def _on_one(rows: Rows, pattern: str | None, metric: str) -> list[dict[str, Any]]:
    """The models of one test set; nothing where the baseline was not evaluated on it."""
    runs = [row for row in rows if fnmatchcase(row["name"], pattern)] if pattern else list(rows[:1])
    if not runs:
        return []
    base = mean_of([run["samples"] for run in runs])
    names = [short(run["name"]) for run in runs]
    label = names[0] if len(names) == 1 else f"{commonprefix(names)}* (mean of {len(names)})"
    others = [row for row in rows if row not in runs]
    lines = []
    for row in [*others, *(runs if len(runs) > 1 else [])]:
        kind = OWN_RUNS if row in runs else KIND.get(row["kind"], "other models")
        about = {"experiment": str(row["folder"]), "model": short(row["name"]), "kind": kind, "against": label}
        lines.append(_judged(about | {"metric": metric} | compare(base, row["samples"], metric)))
    return lines


def _pooled(found: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The models that every test set has: the mean of their differences, its interval and p by Student's t."""
    from scipy.stats import ttest_1samp

    if len(found) < 2:
        return []
    by_name = [{line["model"]: line for line in part if line["kind"] != OWN_RUNS} for part in found]
    lines = []
    for name, first in by_name[0].items():
        if all(name in part for part in by_name):
            differences = np.array([part[name]["difference"] for part in by_name])
            test = ttest_1samp(differences, 0.0)
            low, high = test.confidence_interval(0.95)
            numbers = {"difference": differences.mean(), "low": low, "high": high, "p": test.pvalue}
            lines.append(_judged({**first, "experiment": POOLED} | numbers))
    return lines


def _judged(line: dict[str, Any]) -> dict[str, Any]:
    gained = (line["difference"] < 0) == (line["metric"] in LOWER_IS_BETTER)
    verdict = "within noise" if not (line["low"] > 0 or line["high"] < 0) else "better" if gained else "worse"
    return line | {"verdict": verdict}
