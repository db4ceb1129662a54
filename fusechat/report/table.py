"""The result table: a row a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.app.outputs import RECORD, read_json
from fusechat.app.trees import flatten
from fusechat.report.results import few, short

if TYPE_CHECKING:
    import pandas as pd

SWEPT = {  # stage -> parts of its config that people sweep
    "train": ("loss", "fusion", "optimizer", "token_map", "alignment", "data", "lora", "seed"),
    "merge": ("merge",),
}

METRICS = ("bits_per_byte", "nats_per_token", "accuracy", "next_token_accuracy")  # of evaluation.kind=chats


def table_of(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row a model: bits per byte and accuracy with 95 % intervals, other metrics, accuracy by skill, and overrides
    that differ.
    """
    import pandas as pd

    several = len({row["folder"] for row in rows}) > 1
    configs = [_made(Path(row["model"])) for row in rows]
    differing = _differing(configs)
    tags = few(tag for row in rows for tag in row["metrics"].get("accuracy", {}))
    out = []
    for row, made in zip(rows, configs, strict=True):
        line: dict[str, Any] = {"experiment": str(row["folder"])} if several else {}
        line["model"] = short(row["name"])
        for name, title in (("bits_per_byte", "bits per byte"), ("accuracy", "accuracy %")):
            if name in row["metrics"]:
                scale, digits = (100, 1) if name == "accuracy" else (1, 4)
                entry = row["metrics"][name]["all"]
                line[title] = round(entry["value"] * scale, digits)
                line[f"{title} 95 %"] = f"{entry['low'] * scale:.{digits}f}–{entry['high'] * scale:.{digits}f}"
        own = {name: entry for name, entry in row["metrics"].items() if name not in METRICS}  # of one's own evaluation
        line |= {name: round(entry["all"]["value"], 4) for name, entry in (own | row.get("others", {})).items()}
        by_skill = row["metrics"].get("accuracy", {})
        line |= {tag: round(100 * by_skill[tag]["value"], 1) for tag in tags if tag in by_skill}
        out.append(line | {key: made.get(key, "") for key in differing})
    frame = pd.DataFrame(out)
    numbers = frame.select_dtypes("number").columns
    frame[numbers] += 0.0  # no -0.0
    return frame


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Config keys whose values differ between the runs that made the models."""
    keys = sorted({key for config in configs for key in config})
    return [key for key in keys if len({str(config[key]) for config in configs if key in config}) > 1]


def _made(model: Path) -> dict[str, Any]:
    """The flat config of the stage that made a model, as far as people sweep it."""
    file = model / RECORD
    content = read_json(file) if file.exists() else {}
    swept = SWEPT.get(content.get("stage", ""), ())
    flat = flatten(content.get("config", {}))
    if content.get("recipe"):  # which says itself what the other keys would
        return {key: value for key, value in flat.items() if key == "merge.recipe"}
    return {key: value for key, value in flat.items() if key.split(".")[0] in swept and key != "merge.name"}
