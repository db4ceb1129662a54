"""Forest plots: paired differences from a baseline, with 95 % intervals and verdicts; the rules of `figures`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fusechat.report.figures import legend, pyplot

if TYPE_CHECKING:
    import pandas as pd

VERDICTS = {"better": ("#0072b2", "o"), "worse": ("#d55e00", "s"), "within noise": ("#767676", "D")}
WIDEST = 102  # percentage points, with room for the mark at 100


def forest(rows: pd.DataFrame, unit: str) -> Any:
    """A panel a kind of model. rows: model, kind, against, difference, low, high, verdict."""
    parts = [(kind, part) for kind, part in rows.groupby("kind", sort=False)]
    heights = [len(part) + 1.2 for _, part in parts]
    figure, axes = pyplot().subplots(
        len(parts), 1, figsize=(8.4, 0.9 + 0.3 * sum(heights)), height_ratios=heights, squeeze=False
    )
    for axis, (kind, part) in zip(axes[:, 0], parts, strict=True):
        places = np.arange(len(part))
        _marks(axis, part, places, f"comparisons-points-{kind}")
        axis.set_yticks(places, part["model"], fontsize=9)
        axis.set_ylim(len(part) - 0.4, -0.6)
        axis.margins(x=0.08)
        axis.locator_params(axis="x", nbins=6)  # numbers of five digits stand beside each other
        axis.set_title(kind, loc="left", fontsize=10)
        for place, row in zip(places, part.itertuples(), strict=True):
            told = f"{signed(row.difference)} [{signed(row.low)}, {signed(row.high)}]"
            axis.annotate(told, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes[-1, 0].set_xlabel(f"{unit}, difference from {rows['against'].iloc[0]} with 95 % interval")
    figure.legend(*legend(axes[:, 0]), loc="upper right", ncol=3, fontsize=8, frameon=False)
    figure.tight_layout()
    return figure


def skills(rows: pd.DataFrame) -> Any:
    """A panel a skill, models beneath each other.

    rows: skill, model, against, seeds, n, difference, low, high (shares), verdict.
    """
    parts = [(skill, part) for skill, part in rows.groupby("skill", sort=False)]
    names, shares = list(dict.fromkeys(rows["model"])), ["difference", "low", "high"]
    columns = min(4, len(parts))
    bands = -(-len(parts) // columns)
    size = (1.2 + 2.5 * columns, 0.7 + bands * (0.7 + 0.2 * len(names)))
    figure, axes = pyplot().subplots(bands, columns, figsize=size, sharey=True, sharex=True, squeeze=False)
    for number, (axis, (skill, part)) in enumerate(zip(axes.flat, parts, strict=False)):
        places = np.array([names.index(model) for model in part["model"]])
        _marks(axis, part.assign(**100 * part[shares]), places, f"skills_pooled-points-{number}")
        axis.set_title(f"{skill} (n = {part['n'].iloc[0]}, {part['seeds'].iloc[0]} seeds)", fontsize=9)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.tick_params(labelsize=8, labelbottom=True)
    for axis in axes.flat[len(parts) :]:
        axis.set_visible(False)
    left, right = axes[0, 0].get_xlim()
    axes[0, 0].set_xlim(max(left, -WIDEST), min(right, WIDEST))  # a few seeds' intervals go beyond what there can be
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    told = f"exact match, difference from {rows['against'].iloc[0]} in percentage points with 95 % interval"
    figure.supxlabel(told, fontsize=9)
    figure.legend(*legend(axes.flat), loc="upper right", ncol=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / size[1]))
    return figure


def _marks(axis: Any, rows: pd.DataFrame, places: Any, name: str) -> None:
    """Points with their intervals about the line of no difference, a group ``NAME-VERDICT`` each verdict."""
    for verdict, (colour, marker) in VERDICTS.items():
        held = (rows["verdict"] == verdict).to_numpy()
        if held.any():
            chosen = rows[held]
            axis.hlines(places[held], chosen["low"], chosen["high"], color=colour, linewidth=1.6)
            points = axis.scatter(
                chosen["difference"], places[held], color=colour, marker=marker, s=26, zorder=3, label=verdict
            )
            points.set_gid(f"{name}-{verdict.replace(' ', '-')}")
    axis.axvline(0, color="#333333", linewidth=0.8)


def signed(value: float) -> str:
    """Three digits with their sign; nothing has none."""
    text = f"{value:+.3f}"
    return text[1:] if float(text) == 0 else text
