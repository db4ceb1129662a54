"""Which figures the folders of experiments allow, each with a caption and the table that it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.app.checksums import check_first_use
from fusechat.app.outputs import read_json
from fusechat.report import figures, frames
from fusechat.report.comparisons import POOLED

if TYPE_CHECKING:
    import pandas as pd

MARKS = "Blue circles lie on the better side of the line with their whole interval, orange squares on the worse side, "
MARKS += "grey diamonds are within noise. "
CAPTIONS = {
    "comparisons_pooled": MARKS + "Mean over the test sets of the difference on each, with Student's interval.",
    "comparisons": MARKS + "Paired bootstrap over the same test chats, 2,000 draws.",
    "skills": "Share of answers that match the reference exactly, by the test chats' tag; Wilson's 95 % intervals.",
    "training": "One column a run; grey: the other runs, for comparison. Losses are those of single optimizer steps.",
    "wins": "Share of the response tokens at which each model gave the fused distribution, by the chats' tag. MinCE "
    "takes the model with the lower loss on the reference answer, chat by chat.",
    "alignment": "same: one source token for one of the pivot's; n:1: several source tokens for one; 1:n: one for "
    "several; none: the source has no boundary there, so that the position gets no distribution; "
    "inside: none either, but the source token around it speaks (alignment=chain).",
    "merge_weights": "Blue: more than an equal share; red: less. Grey: no such parameter, or no target changed it.",
}


@dataclass(frozen=True)
class Picture:
    """A figure: its name (of the files NAME.png and NAME.csv), heading, caption, rows, the PNG and the SVG element."""

    name: str
    title: str
    caption: str
    rows: pd.DataFrame
    path: Path
    svg: str


def draw(
    folders: Sequence[Path], rows: Sequence[Mapping[str, Any]], comparisons: pd.DataFrame, output: Path
) -> list[Picture]:
    """Draws what the folders allow, in the order of the page, and writes the PNG and the CSV of each."""
    return [
        _drawn(name, title, table, figure, output)
        for name, title, table, figure in _found(folders, rows, comparisons)
        if len(table)
    ]


def _found(
    folders: Sequence[Path], rows: Sequence[Mapping[str, Any]], comparisons: pd.DataFrame
) -> Iterator[tuple[str, str, pd.DataFrame, Callable[[pd.DataFrame], Any]]]:
    """Name, title, rows and figure."""
    targets = records(folders, "targets/*/fusechat.json")
    yield from _forests(comparisons)
    yield "skills", "By skill", frames.skills(rows), figures.skills
    curves = {name: curve for folder in folders for name, curve in training_curves(folder).items()}
    yield "training", "Training", frames.training(curves, list(figures.QUANTITIES)), figures.training
    fused = {name: made["wins"] for name, made in targets.items() if made.get("sources")}
    yield "wins", "Which model spoke where", frames.wins(fused), figures.wins
    yield "alignment", "Alignment", frames.alignment(records(folders, "aligned/*/manifest.json")), figures.alignment
    for name, made in records(folders, "merged/*/fusechat.json").items():
        if made.get("weights"):
            table = frames.merge_weights(made["weights"], made["targets"])
            yield f"merge_weights_{name}", f"Merge weights: {name}", table, figures.merge_weights


def _forests(
    comparisons: pd.DataFrame,
) -> Iterator[tuple[str, str, pd.DataFrame, Callable[[pd.DataFrame], Any]]]:
    """A forest plot a test set, the pooled one first."""
    places = comparisons["experiment"].unique() if len(comparisons) else []
    for n, place in enumerate(places):
        part = comparisons[comparisons["experiment"] == place]
        unit = str(part["metric"].iloc[0]).replace("_", " ")
        title = f"Against {part['against'].iloc[0]}" + (f": {place}" if len(places) > 1 else "")
        name = "comparisons" if len(places) == 1 else f"comparisons_{n or POOLED}"
        yield name, title, part, lambda found, unit=unit: figures.forest(found, unit)  # type: ignore[misc]


def _drawn(name: str, title: str, table: pd.DataFrame, figure: Callable[[pd.DataFrame], Any], output: Path) -> Picture:
    path = output / f"{name}.png"
    table.to_csv(path.with_suffix(".csv"), index=False)
    caption = next(text for prefix, text in CAPTIONS.items() if name.startswith(prefix))
    return Picture(name, title, caption, table, path, figures.save(figure(table), path))


def records(folders: Sequence[Path], pattern: str) -> dict[str, Any]:
    """What the stages' outputs say of themselves, by the name of their folder."""
    files = [file for folder in folders for file in sorted(folder.glob(pattern))]
    return {file.parent.name: read_json(file) for file in files}


def training_curves(folder: Path) -> dict[str, pd.DataFrame]:
    """Run name -> its logged metrics, the parts of resumed runs put together: of each column a step's last value."""
    import pandas as pd

    found = {}
    for directory in sorted((folder / "logs").glob("train-*")):
        files = [file for file in sorted(directory.glob("from_step_*/metrics.csv")) if file.stat().st_size]
        for file in files:
            check_first_use(file)
        if files:
            steps = pd.concat([pd.read_csv(file) for file in files]).groupby("step", as_index=False)
            found[directory.name.removeprefix("train-")] = steps.last()
    return found
