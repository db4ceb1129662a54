"""Figures, one function each: rows of a table in, a matplotlib figure out, drawn without a display.

Every row is one mark: a bar with the id ``NAME-mark-N`` in the SVG, or one point of a group ``NAME-points-N``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusechat.stores.kinds import KINDS

if TYPE_CHECKING:
    import pandas as pd

# Okabe and Ito's colours, told apart by every kind of colour vision
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000"]


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files alone; the same rows give the same SVG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fusechat"
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> str:
    """Writes the PNG and returns the same figure as an SVG element."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    pyplot().close(figure)
    text = drawn.getvalue()
    return text[text.index("<svg") :]


def skills(rows: pd.DataFrame) -> Any:
    """Exact match of every model, a panel a skill, with Wilson's 95 % intervals; experiments side by side in colours.

    rows: skill, experiment, model, n, correct, value, low, high (shares).
    """
    parts = [(skill, part) for skill, part in rows.groupby("skill", sort=False)]
    names, experiments = list(dict.fromkeys(rows["model"])), list(dict.fromkeys(rows["experiment"]))
    columns = min(3, len(parts))
    bands = -(-len(parts) // columns)
    size = (3.6 * columns, bands * (0.8 + (0.14 + 0.06 * len(experiments)) * len(names)))
    figure, axes = pyplot().subplots(bands, columns, figsize=size, sharey=True, squeeze=False)
    for number, (axis, (skill, part)) in enumerate(zip(axes.flat, parts, strict=False)):
        for e, (experiment, own) in enumerate(part.groupby("experiment", sort=False)):
            apart = 0.24 * (e - (len(experiments) - 1) / 2)
            places = [names.index(model) + apart for model in own["model"]]
            colour = COLOURS[experiments.index(experiment) % len(COLOURS)]
            axis.hlines(places, 100 * own["low"], 100 * own["high"], color=colour, linewidth=1.4, alpha=0.6)
            points = axis.scatter(100 * own["value"], places, color=colour, s=14, zorder=3, label=experiment)
            points.set_gid(f"skills-points-{number}-{e}")
        counts = sorted({int(part["n"].min()), int(part["n"].max())})
        axis.set_title(f"{skill} (n = {' to '.join(map(str, counts))})", fontsize=10)
        axis.set_xlim(-2, 102)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    for axis in axes.flat[len(parts) :]:
        axis.set_visible(False)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    for axis in axes[:, 0]:
        axis.tick_params(axis="y", labelsize=8)
    figure.supxlabel("exact match, %", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, room_for(figure, experiments, axes.flat)))
    return figure


def wins(rows: pd.DataFrame, name: str = "wins") -> Any:
    """For every target, stacked shares of the response tokens each model spoke for. rows: target, tag, model, share."""
    targets, models = list(dict.fromkeys(rows["target"])), list(dict.fromkeys(rows["model"]))
    columns = min(4, len(targets))
    bands, tags = -(-len(targets) // columns), rows["tag"].nunique()
    size = (0.9 + 2.7 * columns, 0.9 + bands * (0.6 + 0.24 * tags))
    figure, axes = pyplot().subplots(bands, columns, figsize=size, squeeze=False, sharex=True)
    for axis, target in zip(axes.flat, targets, strict=False):
        _stacked(axis, rows[rows["target"] == target], "tag", "model", models, name)
        axis.tick_params(labelbottom=True, labelsize=8)
        axis.set_title(target, fontsize=10)
    for axis in axes.flat[len(targets) :]:
        axis.set_visible(False)
    figure.supxlabel("% of response tokens", fontsize=9)
    figure.legend(*legend(axes.flat), loc="outside upper right", ncol=len(models), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / size[1]))
    return figure


def alignment(rows: pd.DataFrame) -> Any:
    """Shares of the pivot's positions by partner, a bar a source. rows: source, kind, positions, share."""
    figure, axis = pyplot().subplots(figsize=(8, 1.1 + 0.3 * rows["source"].nunique()))
    _stacked(axis, rows, "source", "kind", KINDS, "alignment")
    axis.set_xlabel("% of the pivot's response positions")
    axis.legend(ncol=len(KINDS), loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    figure.tight_layout()
    return figure


def merge_weights(rows: pd.DataFrame) -> Any:
    """Layers down, modules across, a panel a target; blue above an equal share 1/n, red below.

    rows: target, layer, module, weight (not a number where a group kept the pivot's value).
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import CenteredNorm
    from matplotlib.patches import Rectangle

    names = list(dict.fromkeys(rows["target"]))
    layers, modules = list(dict.fromkeys(rows["layer"])), list(dict.fromkeys(rows["module"]))
    apart = float((rows["weight"] - 1 / len(names)).abs().max())
    colours = ScalarMappable(CenteredNorm(1 / len(names), apart if apart > 0 else 1e-3), "RdBu")
    width, height = 1.6 + len(names) * (1.0 + 0.3 * len(modules)), min(12.0, 2.2 + 0.28 * len(layers))
    every = -(-len(layers) // 34)  # labels that fit
    figure, axes = pyplot().subplots(1, len(names), figsize=(width, height), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        for row in rows[rows["target"] == name].dropna(subset="weight").itertuples():
            corner = modules.index(row.module), layers.index(row.layer)
            cell = axis.add_patch(Rectangle(corner, 1, 1, color=colours.to_rgba(row.weight)))
            cell.set_gid(f"merge_weights-mark-{row.Index}")
        axis.set(title=name, xlim=(0, len(modules)), ylim=(len(layers), 0), facecolor="#dddddd")
        axis.set_xticks(np.arange(len(modules)) + 0.5, modules, rotation=90, fontsize=7)
        labels = layers[::every] if axis is axes[0, 0] else [""] * len(layers[::every])
        axis.set_yticks(np.arange(0, len(layers), every) + 0.5, labels, fontsize=7)
    bar = figure.colorbar(colours, ax=axes[0].tolist(), shrink=0.8)
    bar.set_label(f"weight; white: 1/{len(names)}", fontsize=8)
    return figure


def _stacked(axis: Any, rows: pd.DataFrame, by: str, part: str, parts: Sequence[str], name: str) -> None:
    """A horizontal bar for each value of ``by``, made up of its ``share`` of each part; a row is a rectangle."""
    bars = list(dict.fromkeys(rows[by]))
    left = dict.fromkeys(bars, 0.0)
    labelled: set[str] = set()
    for index, row in zip(rows.index, rows.to_dict("records"), strict=True):
        number, place, share = list(parts).index(row[part]), row[by], 100 * row["share"]
        label = None if row[part] in labelled else row[part]
        labelled.add(row[part])
        colour = COLOURS[number % len(COLOURS)]
        (bar,) = axis.barh(bars.index(place), share, left=left[place], color=colour, label=label)
        bar.set_gid(f"{name}-mark-{index}")
        left[place] += share
    axis.set_yticks(range(len(bars)), bars, fontsize=8)
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.set_xlim(0, 100)


def room_for(figure: Any, experiments: Sequence[str], axes: Any) -> float:
    """Tells several experiments' colours at the top; the height, as a share, that is left below."""
    if len(experiments) < 2:
        return 1.0
    columns = min(4, len(experiments))
    figure.legend(*legend(axes), loc="upper right", ncol=columns, fontsize=8, frameon=False)
    lines = -(-len(experiments) // columns)
    return float(1 - 0.25 * lines / figure.get_size_inches()[1])


def legend(axes: Any) -> tuple[list[Any], list[str]]:
    """Handles and labels of all axes, each label once."""
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found = dict(zip(labels, handles, strict=True)) | found
    return list(found.values()), list(found)
