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
    figure, axes = plt.subplots(1, len(names), figsize=(1.5 + len(names) * (1.2 + 0.32 * len(columns)), 2.6 + 0.28 * len(rows)), squeeze=False)
    for j, (axis, name) in enumerate(zip(axes[0], names, strict=True)):
        grid = np.array([[cells.get((r, c), [np.nan] * len(names))[j] for c in columns] for r in rows], float)
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(name)
        axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
        axis.set_yticks(range(len(rows)), rows if j == 0 else [""] * len(rows), fontsize=7)
    figure.colorbar(image, ax=axes[0].tolist(), label="merge weight", shrink=0.8)
    return _save(figure, path)
