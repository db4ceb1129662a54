"""The pictures of README and docs, from what the repository holds: the same numbers give the same files.

python docs/pictures.py          writes demo.png and pipeline.svg beside this file
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from fusechat.report.comparisons import judged
from fusechat.report.figures import COLOURS, pyplot, save
from fusechat.report.forests import forest
from fusechat.report.published import PACKAGE
from fusechat.report.statistics import over_seeds

BASELINE = "target sft_"
BOXES = {  # name: what is written in it (a heading and lines below), its middle, its colour
    "chats": ("chats", "any format", (0, 1.0), 7),
    "sources": ("sources", "any size, tokenizer,\narchitecture", (0, 0), 4),
    "pivot": ("pivot", "shape and tokenizer\nof what comes out", (0, 2.0), 4),
    "extract": ("extract", "each model's next-\ntoken distributions", (1.6, 0.5), 0),
    "align": ("align", "onto the pivot's\ntokens", (3.2, 0.5), 0),
    "train": ("train", "one target for\neach source", (4.8, 1.25), 2),
    "merge": ("merge", "VaRM, SCE, TIES, …\none model", (6.4, 1.25), 5),
    "report": ("evaluate, report", "against pivot and SFT,\nwith intervals", (8.0, 1.25), 7),
}
ARROWS = [("chats", "extract"), ("sources", "extract"), ("extract", "align"), ("align", "train")]
ARROWS += [("pivot", "extract"), ("pivot", "train"), ("train", "merge"), ("merge", "report")]
WIDTH, HEIGHT = 1.24, 0.62  # of a box


def differences(published: pd.DataFrame) -> pd.DataFrame:
    """Every model's bits per byte less the mean of the SFT runs, over the seeds; rows for `forests.forest`."""
    values = published.pivot(index="model", columns="seed", values="bits per byte")
    sft = values[values.index.str.startswith(BASELINE)]
    rows = []
    for model, row in (values.drop(sft.index) - sft.mean()).iterrows():
        kind = {"target": "targets", "merged": "merged models"}.get(str(model).split()[0], "pivot and sources")
        about = {
            "model": model,
            "kind": kind,
            "against": f"{BASELINE}* (mean of {len(sft)})",
            "metric": "bits_per_byte",
        }
        rows.append(judged(about | over_seeds(row.tolist())))
    order = ["pivot and sources", "targets", "merged models"]
    return pd.DataFrame(sorted(rows, key=lambda row: (order.index(row["kind"]), -row["difference"])))


def pipeline() -> Any:
    """From chats and models to one fused model: a box a command or an input, an arrow where something flows."""
    from matplotlib.patches import FancyBboxPatch

    figure, axis = pyplot().subplots(figsize=(13.5, 3.9))
    drawn = {}
    for name, (heading, text, (x, y), colour) in BOXES.items():
        corner, look = (x - WIDTH / 2, y - HEIGHT / 2), {"boxstyle": "round,pad=0.02", "facecolor": "white"}
        drawn[name] = axis.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, edgecolor=COLOURS[colour], lw=1.6, **look))
        axis.text(x, y + 0.16, heading, ha="center", va="center", fontsize=10, weight="bold")
        axis.text(x, y - 0.1, text, ha="center", va="center", fontsize=8)
    for start, end in ARROWS:
        sides = {"patchA": drawn[start], "patchB": drawn[end], "shrinkA": 2, "shrinkB": 2}
        style = {"arrowstyle": "-|>", "color": "#555555", "lw": 1.4, **sides}
        axis.annotate("", BOXES[end][2], BOXES[start][2], arrowprops=style)
    axis.set(xlim=(-0.7, 8.7), ylim=(-0.4, 2.4))
    axis.axis("off")
    return figure


def draw(folder: Path) -> None:
    """Writes both."""
    save(forest(differences(pd.read_csv(PACKAGE / "tiny/published.csv")), "bits per byte"), folder / "demo.png")
    drawn = save(pipeline(), folder / "pipeline.png")
    (folder / "pipeline.png").unlink()
    (folder / "pipeline.svg").write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{drawn}', encoding="utf-8")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
