"""Figures, one function each, drawn without a display."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusechat.stores.kinds import KINDS, kind_counts

COLOURS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c"]
CURVES = {
    "train/sft": "SFT loss, nats per token",
    "train/fusion": "fusion loss, nats per token",
    "validation/bits_per_byte": "validation bits per byte",
}
Weights = Mapping[str, Sequence[float] | None]  # group of parameters -> a weight for each target
Entry = Mapping[str, float]  # value, low, high


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot().close(figure)
    return path


def weight_heatmap(groups: Weights, names: Sequence[str], path: Path) -> Path:
    """Merge weights: layers down, modules across, one panel per target; groups outside the layers below."""
    cells = _cells(groups, len(names))
    rows = sorted({r for r, _ in cells}, key=lambda r: (r == "outside", int(r.split()[-1]) if r != "outside" else 0))
    columns = list(dict.fromkeys(c for _, c in cells))
    top = max((w for weights in cells.values() for w in weights if w == w), default=1.0)
    width = 1.5 + len(names) * (1.2 + 0.32 * len(columns))
    height = min(12.0, 2.6 + 0.28 * len(rows))  # a deep model's picture stays one
    every = -(-len(rows) // 34)  # labels that fit
    figure, axes = pyplot().subplots(1, len(names), figsize=(width, height), squeeze=False)
    for j, (axis, name) in enumerate(zip(axes[0], names, strict=True)):
        absent = [np.nan] * len(names)
        grid = np.array([[cells.get((r, c), absent)[j] for c in columns] for r in rows], float)
        image = axis.imshow(grid, vmin=0, vmax=top, cmap="viridis", aspect="auto")
        axis.set_title(name)
        axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
        axis.set_yticks(range(0, len(rows), every), rows[::every] if j == 0 else [""] * len(rows[::every]), fontsize=7)
    figure.colorbar(image, ax=axes[0].tolist(), label="merge weight", shrink=0.8)
    return _save(figure, path)


def _cells(groups: Weights, count: int) -> dict[tuple[str, str], Sequence[float]]:
    """(layer, module) -> a weight for each target; not a number where a group kept the pivot's value."""
    cells: dict[tuple[str, str], Sequence[float]] = {}
    for group, weights in groups.items():
        found = re.match(r"^(.*?\.(\d+))(?:\.(.*))?$", group)
        row, column = (f"layer {int(found[2])}", found[3] or "all") if found else ("outside", group)
        cells[row, column.removesuffix(".weight")] = [np.nan] * count if weights is None else weights
    return cells


def _bars(axis: Any, entries: Sequence[Entry], scale: float = 1.0, **options: Any) -> None:
    """Horizontal bars with their intervals."""
    values, low, high = (np.array([scale * entry[key] for entry in entries]) for key in ("value", "low", "high"))
    axis.barh(range(len(entries)), values, xerr=np.abs([values - low, high - values]), **options)


def result_bars(names: Sequence[str], entries: Sequence[Entry], path: Path) -> Path:
    """Horizontal bars of one metric with 95 % intervals."""
    figure, axis = pyplot().subplots(figsize=(8, 0.5 + 0.32 * len(names)))
    colours = [COLOURS[2 if n.startswith("merged") else 1 if n.startswith("target") else 0] for n in names]
    _bars(axis, entries, color=colours, error_kw={"elinewidth": 1, "capsize": 2})
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("held-out bits per byte of the answer (lower is better), 95 % bootstrap interval")
    return _save(figure, path)


def skill_bars(names: Sequence[str], metrics: Sequence[Mapping[str, Entry]], path: Path) -> Path:
    """One panel a skill: accuracy of every model with its interval."""
    skills = [tag for tag in metrics[0] if tag != "all"] or ["all"]
    columns = min(3, len(skills))
    rows = -(-len(skills) // columns)
    size = (4.2 * columns, rows * (0.6 + 0.24 * len(names)))
    figure, axes = pyplot().subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    absent = dict.fromkeys(("value", "low", "high"), np.nan)
    for axis, skill in zip(axes.flat, skills, strict=False):
        _bars(axis, [m.get(skill, absent) for m in metrics], 100, color=COLOURS[0], error_kw={"elinewidth": 1})
        axis.set_title(skill)
        axis.set_xlim(0, 100)
    for axis in axes.flat[len(skills) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0][0].invert_yaxis()
    figure.supxlabel("exact match, %")
    figure.tight_layout()
    return _save(figure, path)


def curves(runs: Mapping[str, Any], path: Path) -> Path:
    """SFT loss, fusion loss and validation bits per byte over the optimizer steps of every run."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.8))
    for axis, (column, title) in zip(axes, CURVES.items(), strict=True):
        for number, (name, frame) in enumerate(runs.items()):
            part = frame[["step", column]].dropna() if column in frame else frame[:0]
            if len(part) and not (part[column] == 0).all():
                colour = plt.get_cmap("tab10")(number % 10)
                axis.plot(part["step"], part[column], label=name, color=colour, linewidth=1.2)
        axis.set_title(title)
        axis.set_xlabel("optimizer step")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    return _save(figure, path)


def wins(rates: Mapping[str, Mapping[str, Entry]], path: Path) -> Path:
    """For every target, stacked shares of the response tokens each model spoke for, by tag."""
    figure, axes = pyplot().subplots(1, len(rates), figsize=(1.2 + 2.9 * len(rates), 3.4), squeeze=False)
    models = list(dict.fromkeys(m for by_tag in rates.values() for shares in by_tag.values() for m in shares))
    for axis, (target, by_tag) in zip(axes[0], rates.items(), strict=True):
        left = np.zeros(len(by_tag))
        for number, model in enumerate(models):
            values = np.array([100 * shares.get(model, 0.0) for shares in by_tag.values()])
            axis.barh(range(len(by_tag)), values, left=left, color=COLOURS[number % len(COLOURS)], label=model)
            left += values
        axis.set_yticks(range(len(by_tag)), list(by_tag), fontsize=8)
        axis.invert_yaxis()
        axis.set_title(target, fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(models), bbox_to_anchor=(0.5, -0.06), fontsize=8)
    figure.supxlabel("% of response tokens", y=0.02, fontsize=9)
    figure.tight_layout()
    return _save(figure, path)


def alignment(stores: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Shares of pivot positions by how they found their partner, one bar a source."""
    figure, axis = pyplot().subplots(figsize=(8, 0.9 + 0.4 * len(stores)))
    left = np.zeros(len(stores))
    sums = [[*kind_counts(manifest).values()] for manifest in stores.values()]
    shares = np.array([[100 * v / max(1, sum(row)) for v in row] for row in sums])
    for number, kind in enumerate(KINDS):
        axis.barh(range(len(stores)), shares[:, number], left=left, color=COLOURS[number], label=kind)
        left += shares[:, number]
    axis.set_yticks(range(len(stores)), list(stores))
    axis.invert_yaxis()
    axis.set_xlabel("% of the pivot's response positions")
    axis.legend(ncol=4, loc="upper center", bbox_to_anchor=(0.5, 1.3), fontsize=8)
    return _save(figure, path)
