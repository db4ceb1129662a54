"""A mutual training in the report: each side's held-out number over the rounds, and from whom it learned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.app.checksums import check_first_use
from fusechat.app.outputs import RECORD, read_json
from fusechat.report.figures import COLOURS, legend, pyplot

if TYPE_CHECKING:
    import pandas as pd

TABLE = "rounds.csv"  # of a mutual training, beside its record
MARKERS = {"learned": "o", "practised": "s"}
PER_BAND = 3


def tables(places: Mapping[str, Path]) -> pd.DataFrame:
    """What mutual trainings have written: their lines, with ``run``, the training's name, and ``all_bytes`` sent."""
    import pandas as pd

    found = []
    for label, folder in places.items():
        for file in sorted(folder.glob(f"*/{TABLE}")):
            record = read_json(file.with_name(RECORD)) if file.with_name(RECORD).exists() else {}
            if record.get("stage") == "mutual" and file.stat().st_size:
                check_first_use(file)
                frame, name = pd.read_csv(file), file.parent.name
                frame.insert(0, "run", f"{label}: {name}" if len(places) > 1 else name)
                frame["all_bytes"] = sum(sum(round["bytes"].values()) for round in record["rounds"])
                found.append(frame)
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def held_out(lines: pd.DataFrame) -> pd.DataFrame:
    """Columns: run, side, round, stage, bits_per_byte, sent_bytes, all_bytes (of the run); lines without a held-out
    number are left out.
    """
    columns = ["run", "side", "round", "stage", "bits_per_byte", "sent_bytes", "all_bytes"]
    return lines[columns].dropna(subset="bits_per_byte").reset_index(drop=True) if len(lines) else lines


def heard(lines: pd.DataFrame) -> pd.DataFrame:
    """Of whom a side's distributions were, itself among them. Columns of `figures.wins`: target, tag, model, share."""
    import pandas as pd

    found: list[dict[str, Any]] = []
    for row in lines[lines["stage"] == "learned"].to_dict("records") if len(lines) else []:
        shares = {name.removeprefix("from_"): row[name] for name in row if name.startswith("from_")}
        about = {"target": f"{row['run']}: {row['side']}", "tag": f"round {row['round']}"}
        of = {"itself": 1 - row["learned"], **shares}
        found += [{**about, "model": name, "share": share} for name, share in of.items() if share > 0]
    return pd.DataFrame(found)


def rounds(rows: pd.DataFrame) -> Any:
    """Held-out bits per byte over the rounds, a panel a training, a colour a side; practising half a round later.

    rows: of `held_out`.
    """
    runs, sides = list(dict.fromkeys(rows["run"])), list(dict.fromkeys(rows["side"]))
    columns = min(PER_BAND, len(runs))
    bands = -(-len(runs) // columns)
    size = (0.8 + 3.2 * columns, 0.7 + 2.6 * bands)
    figure, axes = pyplot().subplots(bands, columns, figsize=size, squeeze=False, sharey=True)
    for number, (axis, run) in enumerate(zip(axes.flat, runs, strict=False)):
        own = rows[rows["run"] == run]
        for place, side in enumerate(sides):
            part, colour = own[own["side"] == side], COLOURS[place % len(COLOURS)]
            at = part.assign(at=part["round"] + 0.5 * (part["stage"] == "practised")).sort_values("at")
            axis.plot(at["at"], at["bits_per_byte"], color=colour, linewidth=1, zorder=2)
            for stage, some in at.groupby("stage"):
                label = side if stage == at["stage"].iloc[0] else None
                marker = MARKERS[str(stage)]
                points = axis.scatter(
                    some["at"], some["bits_per_byte"], s=16, color=colour, marker=marker, zorder=3, label=label
                )
                points.set_gid(f"mutual_rounds-points-{number}-{place}-{stage}")
        axis.set_title(f"{run} ({own['all_bytes'].iloc[0] / 1e6:.1f} MB sent)", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat[len(runs) :]:
        axis.set_visible(False)
    figure.supxlabel("round", fontsize=9)
    figure.supylabel("held-out bits per byte", fontsize=9)
    figure.legend(*legend(axes.flat), loc="upper right", ncol=min(6, len(sides)), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / size[1]))
    return figure
