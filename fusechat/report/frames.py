"""What the figures show, as tables: the rows of each figure's CSV."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.report.results import has, short
from fusechat.stores.kinds import kind_counts

if TYPE_CHECKING:
    import pandas as pd

Weights = Mapping[str, Sequence[float] | None]  # group of parameters -> a weight for each target


def skills(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Exact matches by skill with Wilson's 95 % interval. Columns: skill, model, n, correct, value, low, high."""
    from scipy.stats import binomtest

    found = []
    for row in rows:
        answered = [sample for sample in row["samples"] if has(sample, "accuracy")]
        for skill in sorted({sample["tag"] for sample in answered}):
            part = [bool(sample["correct"]) for sample in answered if sample["tag"] == skill]
            interval = binomtest(sum(part), len(part)).proportion_ci(method="wilson")
            counts = {"skill": skill or "all", "model": short(row["name"]), "n": len(part), "correct": sum(part)}
            bounds = {"low": float(interval.low), "high": float(interval.high)}
            found.append(counts | {"value": sum(part) / len(part), **bounds})
    frame = _frame(found)
    return frame.sort_values("skill", kind="stable", ignore_index=True) if len(frame) else frame


def training(runs: Mapping[str, pd.DataFrame], quantities: Sequence[str]) -> pd.DataFrame:
    """Points of the training curves. Columns: run, quantity, step, value; a loss that is always 0 is left out."""
    rows = []
    for run, logged in runs.items():
        for quantity in (quantity for quantity in quantities if quantity in logged):
            part = logged[["step", quantity]].dropna()
            if (part[quantity] != 0).any():
                pairs = part.itertuples(index=False)
                rows += [{"run": run, "quantity": quantity, "step": int(s), "value": float(v)} for s, v in pairs]
    return _frame(rows)


def wins(targets: Mapping[str, Mapping[str, Mapping[str, float]]]) -> pd.DataFrame:
    """Share of the response tokens that each model spoke for. Columns: target, tag, model, share."""
    return _frame(
        [
            {"target": target, "tag": tag, "model": model, "share": share}
            for target, by_tag in targets.items()
            for tag, shares in by_tag.items()
            for model, share in shares.items()
        ]
    )


def alignment(stores: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The pivot's positions by partner. stores: manifests by source. Columns: source, kind, positions, share."""
    rows = []
    for source, manifest in stores.items():
        counts = kind_counts(manifest)
        total = max(1, sum(counts.values()))
        rows += [{"source": source, "kind": k, "positions": n, "share": n / total} for k, n in counts.items()]
    return _frame(rows)


def merge_weights(groups: Weights, names: Sequence[str]) -> pd.DataFrame:
    """Weights by layer and module, those outside the layers last. Columns: target, layer, module, group, weight."""
    places = {group: re.match(r"^.*?\.(\d+)(?:\.(.*))?$", group) for group in groups}
    order = sorted(groups, key=lambda group: int(found[1]) if (found := places[group]) else math.inf)
    rows = []
    for target, name in enumerate(names):
        for group in order:
            found, weights = places[group], groups[group]
            layer, module = (f"layer {found[1]}", found[2] or "all") if found else ("outside", group)
            weight = float("nan") if weights is None else weights[target]
            rows.append({"target": name, "layer": layer, "module": module.removesuffix(".weight"), "group": group})
            rows[-1]["weight"] = weight  # type: ignore[assignment]
    return _frame(rows)


def weights_picture(groups: Weights, names: Sequence[str], path: Path) -> Path:
    """The picture of a merge's weights, for the merged model's own folder."""
    from fusechat.report import figures

    figures.save(figures.merge_weights(merge_weights(groups, names)), path)
    return path


def _frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows)
