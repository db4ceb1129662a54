"""Which figures the folders of experiments allow."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.report import figures
from fusechat.report.results import short

if TYPE_CHECKING:
    import pandas as pd

Picture = tuple[str, Path]  # title and file


def draw(folders: Sequence[Path], rows: Sequence[Mapping[str, Any]], output: Path) -> list[Picture]:
    """Draws what the folders allow, in the order of the page."""
    names, metrics = [short(row["name"]) for row in rows], [row["metrics"] for row in rows]
    targets = records(folders, "targets/*/fusechat.json")
    fused = {name: made["wins"] for name, made in targets.items() if made["sources"]}
    curves = {name: curve for folder in folders for name, curve in training_curves(folder).items()}
    stores = records(folders, "aligned/*/manifest.json")
    found: list[Picture] = []

    def add(title: str, figure: Callable[..., Path], *given: Any, file: str) -> None:
        found.append((title, figure(*given, output / file)))

    if all("bits_per_byte" in metric for metric in metrics):
        bits = [metric["bits_per_byte"]["all"] for metric in metrics]
        add("Results: held-out bits per byte", figures.result_bars, names, bits, file="results.png")
    if all("accuracy" in metric for metric in metrics):
        accuracy = [metric["accuracy"] for metric in metrics]
        add("Accuracy per skill, 95 % intervals", figures.skill_bars, names, accuracy, file="skills.png")
    if curves:
        add("Training curves", figures.curves, curves, file="training.png")
    if fused:
        add("Who spoke for how many response tokens", figures.wins, fused, file="wins.png")
    if stores:
        add("Alignment: how pivot positions found a partner", figures.alignment, stores, file="alignment.png")
    return found + merge_weights(folders, output)


def records(folders: Sequence[Path], pattern: str) -> dict[str, Any]:
    """What the stages' outputs say of themselves, by the name of their folder."""
    files = [file for folder in folders for file in sorted(folder.glob(pattern))]
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def merge_weights(folders: Sequence[Path], output: Path) -> list[Picture]:
    """Copies of the pictures that the merges have drawn."""
    found = []
    for file in (file for folder in folders for file in sorted(folder.glob("merged/*/merge_weights.png"))):
        copy = output / f"merge_weights_{file.parent.name}.png"
        copy.write_bytes(file.read_bytes())
        found.append((f"Merge weights: {file.parent.name}", copy))
    return found


def training_curves(folder: Path) -> dict[str, pd.DataFrame]:
    """Run name -> its logged metrics, the parts of resumed runs put together: of each column a step's last value."""
    import pandas as pd

    found = {}
    for directory in sorted((folder / "logs").glob("train-*")):
        files = [file for file in sorted(directory.glob("from_step_*/metrics.csv")) if file.stat().st_size]
        if files:
            steps = pd.concat([pd.read_csv(file) for file in files]).groupby("step", as_index=False)
            found[directory.name.removeprefix("train-")] = steps.last()
    return found
