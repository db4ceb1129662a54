"""Figures of training: curves by run, and what held-out chats foretell of the test; the rules of `figures`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from fusechat.report.figures import COLOURS, pyplot, room_for

if TYPE_CHECKING:
    import pandas as pd

QUANTITIES = {
    "train/sft": "SFT loss\nnats per token",
    "train/fusion": "fusion loss\nnats per token",
    "validation/bits_per_byte": "validation\nbits per byte",
}
PER_BAND = 4  # runs beside each other among the training curves


def training(rows: pd.DataFrame) -> Any:
    """A column a run, a row a quantity; experiments in colours, or the other runs of a single one in grey behind.

    rows: experiment, run, quantity, step, value.
    """
    runs, experiments = list(dict.fromkeys(rows["run"])), list(dict.fromkeys(rows["experiment"]))
    shown = [quantity for quantity in QUANTITIES if (rows["quantity"] == quantity).any()]
    columns = min(PER_BAND, len(runs))
    bands = -(-len(runs) // PER_BAND)
    size = (2.6 * columns, 0.4 + 1.5 * bands * len(shown))
    shared: dict[str, Any] = {"squeeze": False, "sharex": True, "sharey": "row"}
    figure, axes = pyplot().subplots(bands * len(shown), columns, figsize=size, **shared)
    for (number, run), (line, quantity) in itertools.product(enumerate(runs), enumerate(shown)):
        axis = axes[number // PER_BAND * len(shown) + line, number % PER_BAND]
        of_quantity = rows[rows["quantity"] == quantity]
        if len(experiments) == 1:
            for _, part in of_quantity[of_quantity["run"] != run].groupby("run", sort=False):
                axis.plot(part["step"], part["value"], color="#d9d9d9", zorder=2, linewidth=1)
        for experiment, part in of_quantity[of_quantity["run"] == run].groupby("experiment", sort=False):
            e = experiments.index(experiment)
            colour = COLOURS[e % len(COLOURS)]
            axis.plot(part["step"], part["value"], color=colour, zorder=3, linewidth=1)
            points = axis.scatter(part["step"], part["value"], s=5, color=colour, zorder=4, label=experiment)
            points.set_gid(f"training-points-{number}-{line}-{e}")
        if not axis.lines:
            axis.annotate("none", (0.5, 0.5), xycoords="axes fraction", ha="center", fontsize=8, color="#767676")
        if line == 0:
            axis.set_title(run, fontsize=9)
        if number % PER_BAND == 0:
            axis.set_ylabel(QUANTITIES[quantity], fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes[-len(shown) :, len(runs) - (bands - 1) * PER_BAND :].flat:
        axis.set_visible(False)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, room_for(figure, experiments, axes.flat)))
    return figure


def objective(rows: pd.DataFrame, unit: str) -> Any:
    """Targets by what was held out of training and by the test, a panel an experiment.

    rows: experiment, model, held_out, test, correlation.
    """
    parts = [(experiment, part) for experiment, part in rows.groupby("experiment", sort=False)]
    columns = min(3, len(parts))
    bands = -(-len(parts) // columns)
    figure, axes = pyplot().subplots(bands, columns, figsize=(0.6 + 3.6 * columns, 0.3 + 2.8 * bands), squeeze=False)
    for number, (axis, (experiment, part)) in enumerate(zip(axes.flat, parts, strict=False)):
        axis.scatter(part["held_out"], part["test"], s=18, color=COLOURS[0]).set_gid(f"objective-points-{number}")
        for row in part.itertuples():
            name = str(row.model).removeprefix("target ")
            axis.annotate(name, (row.held_out, row.test), xytext=(4, 3), textcoords="offset points", fontsize=7)
        axis.margins(0.16)
        axis.tick_params(labelsize=7)
        told = f"rank correlation {part['correlation'].iloc[0]:.2f} (n = {len(part)})"
        axis.set_title(f"{experiment}: {told}" if len(parts) > 1 else told, fontsize=9)
    for axis in axes.flat[len(parts) :]:
        axis.set_visible(False)
    figure.supxlabel("bits per byte held out of training (the objective of searches)", fontsize=9)
    figure.supylabel(f"test, {unit}", fontsize=9)
    figure.tight_layout()
    return figure
