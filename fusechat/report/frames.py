"""What the figures show, as tables: the rows of each figure's CSV."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.report.comparisons import MADE, POOLED, comparisons
from fusechat.report.results import few, has, short
from fusechat.stores.kinds import kind_counts

if TYPE_CHECKING:
    import pandas as pd

SPEED = "train/tokens_per_second"
Weights = Mapping[str, Sequence[float] | None]  # group of parameters -> a weight for each target


def skills(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Exact matches by skill with Wilson's 95 % interval; of all where skills are not `few`.

    Columns: skill, experiment, model, n, correct, value, low, high.
    """
    from scipy.stats import binomtest

    found = []
    tags = few(sample["tag"] for row in rows for sample in row["samples"] if has(sample, "accuracy"))
    for row in rows:
        answers = [(sample["tag"] if tags else "", sample) for sample in row["samples"] if has(sample, "accuracy")]
        for skill in sorted({tag for tag, _ in answers}):
            part = [bool(sample["correct"]) for tag, sample in answers if tag == skill]
            interval = binomtest(sum(part), len(part)).proportion_ci(method="wilson")
            counts = {"skill": skill or "all", "experiment": str(row["folder"]), "model": short(row["name"])}
            counts |= {"n": len(part), "correct": sum(part)}
            bounds = {"low": float(interval.low), "high": float(interval.high)}
            found.append(counts | {"value": sum(part) / len(part), **bounds})
    frame = _frame(found)
    return frame.sort_values("skill", kind="stable", ignore_index=True) if len(frame) else frame


def skills_pooled(rows: Sequence[Mapping[str, Any]], baseline: str | None) -> pd.DataFrame:
    """Exact matches of what fusing made against the baseline, of all and by skill, as `comparisons` pools them.

    Columns: skill, model, kind, against, seeds, n (chats of all seeds), difference, low, high (shares), p, verdict.
    """
    answered = [{**row, "samples": part} for row in rows if (part := [s for s in row["samples"] if has(s, "accuracy")])]
    tags = few(sample["tag"] for row in answered for sample in row["samples"])
    found = []
    for skill in ["all", *tags]:
        part = [{**row, "samples": [s for s in row["samples"] if skill in ("all", s["tag"])]} for row in answered]
        part = [row for row in part if row["samples"]]
        if baseline is None or any(fnmatchcase(row["name"], baseline) for row in part):
            each = comparisons(part, baseline, "accuracy")
            pooled = each[(each["experiment"] == POOLED) & each["kind"].isin(MADE)] if len(each) else each
            found += [{"skill": skill, **line} for line in pooled.to_dict("records")]
    columns = ["skill", "model", "kind", "against", "seeds", "n", "difference", "low", "high", "p", "verdict"]
    return _frame(found)[columns] if found else _frame([])


def training(runs: Mapping[tuple[str, str], pd.DataFrame], quantities: Sequence[str]) -> pd.DataFrame:
    """Points of the training curves; a loss that is always 0 is left out. runs: by experiment and name.

    Columns: experiment, run, quantity, step, value.
    """
    rows = []
    for (experiment, run), logged in runs.items():
        for quantity in (quantity for quantity in quantities if quantity in logged):
            part = logged[["step", quantity]].dropna()
            if (part[quantity] != 0).any():
                pairs = part.itertuples(index=False)
                about = {"experiment": experiment, "run": run, "quantity": quantity}
                rows += [{**about, "step": int(step), "value": float(value)} for step, value in pairs]
    return _frame(rows)


def cost(
    targets: Mapping[tuple[str, str], tuple[Mapping[str, Any], pd.DataFrame | None]], several: bool
) -> pd.DataFrame:
    """Steps and speed of trainings, by experiment and name. targets: records, with what was logged."""
    rows = []
    for (experiment, name), (record, logged) in targets.items():
        speed = float("nan") if logged is None or SPEED not in logged else float(logged[SPEED].median())
        line: dict[str, Any] = {"experiment": experiment} if several else {}
        line |= {"target": name, "steps": record.get("steps"), "tokens per second": round(speed, 0)}
        rows.append(line | {"hardware": ", ".join(f"{k} {v}" for k, v in record.get("hardware", {}).items())})
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


def objective(
    rows: Sequence[Mapping[str, Any]], targets: Mapping[tuple[str, str], Mapping[str, Any]], metric: str
) -> pd.DataFrame:
    """What searches over trainings minimise, the bits per byte held out of training, and what tests then say.

    rows: evaluations; targets: records by experiment and name. Experiments with three targets and more are shown, each
    with Spearman's rank correlation. Columns: experiment, model, held_out, test, correlation.
    """
    from scipy.stats import spearmanr

    held: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        record = targets.get((str(row["folder"]), str(row["name"]).removeprefix("targets-")), {})
        value = record.get("metrics", {}).get("validation/bits_per_byte")
        if row["kind"] == "targets" and value is not None:
            about = {"experiment": str(row["folder"]), "model": short(row["name"]), "held_out": value}
            held.setdefault(about["experiment"], []).append(about | {"test": row["metrics"][metric]["all"]["value"]})
    shown = [part for part in held.values() if len(part) > 2]
    for part in shown:
        found = spearmanr(*([line[column] for line in part] for column in ("held_out", "test"))).statistic
        for line in part:
            line["correlation"] = round(float(found), 3) if math.isfinite(found) else 0.0
    return _frame([line for part in shown for line in part])


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
