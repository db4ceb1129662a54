"""Figures, one function each, drawn without a display."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from fusechat.stores.kinds import KINDS, kind_counts

COLOURS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c"]


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def weight_heatmap(groups: Mapping[str, Sequence[float] | None], names: Sequence[str], path: Path) -> Path:
    """Merge weights: layers down, modules across, one panel per target; groups outside the layers below."""
    cells: dict[tuple[str, str], Sequence[float]] = {}
    for group, weights in groups.items():
        found = re.match(r"^(.*?\.(\d+))(?:\.(.*))?$", group)
        row, column = (f"layer {int(found[2])}", found[3] or "all") if found else ("outside", group)
        cells[row, column.removesuffix(".weight")] = weights if weights is not None else [np.nan] * len(names)
    rows = sorted({r for r, _ in cells}, key=lambda r: (r == "outside", int(r.split()[-1]) if r != "outside" else 0))
    columns = list(dict.fromkeys(c for _, c in cells))
    top = max((w for weights in cells.values() for w in weights if w == w), default=1.0)
    size = (
        1.5 + len(names) * (1.2 + 0.32 * len(columns)),
        min(12.0, 2.6 + 0.28 * len(rows)),
    )  # a deep model's picture stays one
    every = -(-len(rows) // 34)
    figure, axes = plt.subplots(1, len(names), figsize=size, squeeze=False)
    for j, (axis, name) in enumerate(zip(axes[0], names, strict=True)):
        grid = np.array([[cells.get((r, c), [np.nan] * len(names))[j] for c in columns] for r in rows], float)
        image = axis.imshow(grid, vmin=0, vmax=top, cmap="viridis", aspect="auto")
        axis.set_title(name)
        axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
        axis.set_yticks(range(0, len(rows), every), rows[::every] if j == 0 else [""] * len(rows[::every]), fontsize=7)
    figure.colorbar(image, ax=axes[0].tolist(), label="merge weight", shrink=0.8)
    return _save(figure, path)


def result_bars(names: Sequence[str], entries: Sequence[Mapping[str, float]], path: Path) -> Path:
    """Horizontal bars of one metric with 95 % intervals."""
    figure, axis = plt.subplots(figsize=(8, 0.5 + 0.32 * len(names)))
    values = np.array([e["value"] for e in entries])
    error = np.abs(np.array([[e["value"] - e["low"] for e in entries], [e["high"] - e["value"] for e in entries]]))
    colours = [COLOURS[2 if n.startswith("merged") else 1 if n.startswith("target") else 0] for n in names]
    axis.barh(range(len(names)), values, xerr=error, color=colours, error_kw={"elinewidth": 1, "capsize": 2})
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("held-out bits per byte of the answer (lower is better), 95 % bootstrap interval")
    return _save(figure, path)


def skill_bars(names: Sequence[str], metrics: Sequence[Mapping[str, Mapping[str, float]]], path: Path) -> Path:
    """One panel a skill: accuracy of every model with its interval."""
    skills = [tag for tag in metrics[0] if tag != "all"] or ["all"]
    columns = min(3, len(skills))
    rows = -(-len(skills) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, rows * (0.6 + 0.24 * len(names))), sharey=True, squeeze=False
    )
    for axis, skill in zip(axes.flat, skills, strict=False):
        entries = [m.get(skill, {"value": np.nan, "low": np.nan, "high": np.nan}) for m in metrics]
        values = np.array([100 * e["value"] for e in entries])
        error = np.abs(
            np.array(
                [
                    [v - 100 * e["low"] for v, e in zip(values, entries, strict=True)],
                    [100 * e["high"] - v for v, e in zip(values, entries, strict=True)],
                ]
            )
        )
        axis.barh(range(len(names)), values, xerr=error, color=COLOURS[0], error_kw={"elinewidth": 1})
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
    panels = [
        ("train/sft", "SFT loss, nats per token"),
        ("train/fusion", "fusion loss, nats per token"),
        ("validation/bits_per_byte", "validation bits per byte"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.8))
    for axis, (column, title) in zip(axes, panels, strict=True):
        for number, (name, frame) in enumerate(runs.items()):
            if column in frame and frame[column].notna().any():
                part = frame[["step", column]].dropna()
                if not (part[column] == 0).all():
                    axis.plot(
                        part["step"], part[column], label=name, color=plt.get_cmap("tab10")(number % 10), linewidth=1.2
                    )
        axis.set_title(title)
        axis.set_xlabel("optimizer step")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    return _save(figure, path)


def wins(rates: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> Path:
    """For every target, stacked shares of the response tokens each model spoke for, by tag."""
    figure, axes = plt.subplots(1, len(rates), figsize=(1.2 + 2.9 * len(rates), 3.4), squeeze=False)
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
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.4 * len(stores)))
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
