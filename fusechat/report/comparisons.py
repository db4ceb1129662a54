"""Every model against its experiment's baseline: on one test set by its chats, over seeds by their differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from fusechat.app.errors import UserError
from fusechat.app.labels import family
from fusechat.report.results import KIND, LOWER_IS_BETTER, short
from fusechat.report.statistics import compare, mean_of, over_seeds

if TYPE_CHECKING:
    import pandas as pd

BASELINES = ("targets-sft_[0-9]*", "targets-sft")  # as the pipelines name plain SFT: its shuffles, or a single run
OWN_RUNS = "baseline, run by run"
POOLED = "pooled"
MADE = (KIND["targets"], KIND["merged"])  # what fusing made; the pivot and the sources are what it was made from
NAME = "name"  # of a model, without its experiment's
NUMBERS = ("difference", "low", "high", "p")
Rows = Sequence[Mapping[str, Any]]


def comparisons(rows: Rows, baseline: str | None, metric: str) -> pd.DataFrame:
    """Every model against the baseline of its experiment. Several runs of the baseline stand as their mean, by chat.

    Columns: experiment, tests, model, kind, against, metric, seeds, n (chats of all of them), difference, low and high
    of its 95 % interval, p, and the verdict: better, worse or within noise. Intervals are paired bootstraps over the
    chats of a test set. Of experiments that differ in their seed alone (`family`) the rows of experiment `POOLED` come
    first: the mean of a model's differences, with Student's interval over the seeds. baseline: an evaluation's name, or
    a pattern of names; None: the first of `BASELINES` that is there, else each test set's first evaluation. An
    experiment without one is compared with another's on the same test set. Raises `UserError` for a name that is not
    there.
    """
    import pandas as pd

    names = [row["name"] for row in rows]
    patterns = [baseline] if baseline else BASELINES
    pattern = next((p for p in patterns if any(fnmatchcase(name, p) for name in names)), None)
    if pattern is None and baseline:
        raise UserError(f"report.baseline={baseline!r} is in no evaluation; use one of: {', '.join(names)}")
    sets: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        sets.setdefault(row["tests"], {}).setdefault(str(row["folder"]), []).append(row)
    found = [lines for experiments in sets.values() for lines in _on_one(experiments, pattern, metric)]
    each = pd.DataFrame([line for lines in found for line in lines])
    pooled = _pooled([lines for lines in found if lines])
    frame = pd.concat([pd.DataFrame(pooled), each], ignore_index=True).round(4)
    if len(frame):
        frame[list(NUMBERS)] += 0.0  # no -0.0
    return frame.drop(columns=NAME, errors="ignore")


def _on_one(experiments: Mapping[str, Rows], pattern: str | None, metric: str) -> Iterator[list[dict[str, Any]]]:
    """A test set's lines, by experiment; none where no baseline was evaluated on it."""
    every = [row for part in experiments.values() for row in part]
    for experiment, rows in experiments.items():
        chosen = [[row for row in part if fnmatchcase(row["name"], pattern or "")] for part in (rows, every)]
        runs = (chosen[0] or chosen[1]) if pattern else every[:1]
        if not runs:
            continue
        base = mean_of([run["samples"] for run in runs])
        names = list(dict.fromkeys(short(run["name"]) for run in runs))
        label = names[0] if len(runs) == 1 else f"{commonprefix(names)}* (mean of {len(runs)})"
        others = [row for row in rows if row not in runs]
        lines = []
        for row in [*others, *(runs if len(runs) > 1 and chosen[0] else [])]:
            kind = OWN_RUNS if row in runs else KIND.get(row["kind"], "other models")
            name = short(row["name"])
            shown = f"{experiment}: {name}" if len(experiments) > 1 else name
            about = {"experiment": experiment, "tests": row["tests"], NAME: name, "model": shown, "kind": kind}
            about |= {"against": label, "metric": metric, "seeds": 1, "n": len(row["samples"])}
            lines.append(judged(about | compare(base, row["samples"], metric)))
        yield lines


def _pooled(found: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """For each family of seeds the models that every seed has: the mean of their differences, interval and p by t."""
    families: dict[str, list[dict[str, Mapping[str, Any]]]] = {}
    for lines in found:
        by_name = {line[NAME]: line for line in lines if line["kind"] != OWN_RUNS}
        families.setdefault(family(lines[0]["experiment"]), []).append(by_name)
    several = {name: seeds for name, seeds in families.items() if len(seeds) > 1}
    pooled = []
    for own, seeds in several.items():
        for name, first in seeds[0].items():
            if all(name in seed for seed in seeds):
                numbers = over_seeds([seed[name]["difference"] for seed in seeds])
                shown = f"{own}: {name}" if len(several) > 1 else name
                counts = {"seeds": len(seeds), "n": sum(seed[name]["n"] for seed in seeds)}
                about = {**first, "experiment": POOLED, "tests": POOLED, "model": shown} | counts
                pooled.append(judged(about | numbers))
    sign = 1 if pooled and pooled[0]["metric"] in LOWER_IS_BETTER else -1
    kinds = [line["kind"] for line in pooled]
    return sorted(pooled, key=lambda line: (kinds.index(line["kind"]), -sign * line["difference"]))  # worst first


def judged(line: dict[str, Any]) -> dict[str, Any]:
    """A difference with the verdict that its interval allows."""
    gained = (line["difference"] < 0) == (line["metric"] in LOWER_IS_BETTER)
    verdict = "within noise" if not (line["low"] > 0 or line["high"] < 0) else "better" if gained else "worse"
    return line | {"verdict": verdict}
