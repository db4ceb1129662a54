"""Which figures the folders of experiments allow, each with a caption and the table that it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.app.checksums import check_first_use
from fusechat.app.outputs import read_json
from fusechat.report import curves, figures, forests, frames, rounds
from fusechat.report.comparisons import POOLED

if TYPE_CHECKING:
    import pandas as pd

MARKS = "Blue circles lie on the better side of the line with their whole interval, orange squares on the worse side, "
MARKS += "grey diamonds are within noise. "
OVER_SEEDS = "Mean over the seeds of the difference from each seed's own baseline on the same chats, with Student's "
OVER_SEEDS += "interval: a seed is one observation, whatever the number of its chats."
CAPTIONS = {
    "comparisons_pooled": MARKS + OVER_SEEDS,
    "comparisons": MARKS + "Paired bootstrap over the same test chats, 2,000 draws.",
    "skills_pooled": MARKS
    + "Share of answers that match the reference exactly, by the test chats' tag. "
    + OVER_SEEDS
    + " Of so many intervals about one in twenty lies off the line by chance.",
    "skills": "Share of answers that match the reference exactly, by the test chats' tag: each evaluation by itself, "
    "with Wilson's 95 % interval.",
    "training": "One column a run; grey: the other runs, for comparison; where there are several experiments, these in "
    "colours. Losses are those of single optimizer steps.",
    "objective": "Each target by the bits per byte of the chats held out of its training, by which trainings are "
    "stopped and searched, and by the test. Spearman's rank correlation says how well the one foretells the other.",
    "wins": "Share of the response tokens at which each model gave the fused distribution, by the chats' tag. MinCE "
    "takes the model with the lower loss on the reference answer, chat by chat.",
    "mutual_rounds": "Circles: after learning from what others said of the public chats; squares, half a round later: "
    "after practising on private ones.",
    "mutual_heard": "Share of the response tokens of the public chats whose distribution a side took from each other; "
    "itself: nobody knew that chat better.",
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
    places: Mapping[str, Path],
    rows: Sequence[Mapping[str, Any]],
    comparisons: pd.DataFrame,
    metric: str,
    baseline: str | None,
    output: Path,
) -> list[Picture]:
    """Draws what the folders allow, in the order of the page, with a PNG and a CSV each. places: by label."""
    return [
        _drawn(name, title, table, figure, output)
        for name, title, table, figure in _found(places, rows, comparisons, metric, baseline)
        if len(table)
    ]


def _found(
    places: Mapping[str, Path],
    rows: Sequence[Mapping[str, Any]],
    comparisons: pd.DataFrame,
    metric: str,
    baseline: str | None,
) -> Iterator[tuple[str, str, pd.DataFrame, Callable[[pd.DataFrame], Any]]]:
    """Name, title, rows and figure."""
    targets = records(places, "targets/*/fusechat.json")
    yield from _forests(comparisons)
    yield "skills_pooled", "By skill, over the seeds", frames.skills_pooled(rows, baseline), forests.skills
    yield "skills", "By skill", frames.skills(rows), figures.skills
    logged = {(e, run): curve for e, folder in places.items() for run, curve in training_curves(folder).items()}
    yield "training", "Training", frames.training(logged, list(curves.QUANTITIES)), curves.training
    unit = metric.replace("_", " ")
    judged = frames.objective(rows, targets, metric)
    yield "objective", "What searches minimise, and the test", judged, lambda found: curves.objective(found, unit)
    fused = {_called(key, places): made["wins"] for key, made in targets.items() if made.get("sources")}
    yield "wins", "Which model spoke where", frames.wins(fused), figures.wins
    mutual = rounds.tables(places)
    yield "mutual_rounds", "Mutual training, round by round", rounds.held_out(mutual), rounds.rounds
    heard = rounds.heard(mutual)
    yield "mutual_heard", "Who was learned from", heard, lambda found: figures.wins(found, "mutual_heard")
    stores = {_called(key, places): made for key, made in records(places, "aligned/*/manifest.json").items()}
    yield "alignment", "Alignment", frames.alignment(stores), figures.alignment
    for key, made in records(places, "merged/*/fusechat.json").items():
        if made.get("weights"):
            name = "_".join(key if len(places) > 1 else key[1:]).replace("/", "-")
            table = frames.merge_weights(made["weights"], made["targets"])
            yield f"merge_weights_{name}", f"Merge weights: {_called(key, places)}", table, figures.merge_weights


def _called(key: tuple[str, str], places: Mapping[str, Path]) -> str:
    """An output's name, with its experiment's where there are several."""
    return f"{key[0]}: {key[1]}" if len(places) > 1 else key[1]


def _forests(
    comparisons: pd.DataFrame,
) -> Iterator[tuple[str, str, pd.DataFrame, Callable[[pd.DataFrame], Any]]]:
    """A forest plot a test set, the pooled one first."""
    sets = list(comparisons["tests"].unique()) if len(comparisons) else []
    for n, tests in enumerate(sets):
        part = comparisons[comparisons["tests"] == tests]
        unit = str(part["metric"].iloc[0]).replace("_", " ")
        whose = f": {', '.join(part['experiment'].unique())}" if len(sets) > 1 else ""
        whose = f", over {part['seeds'].iloc[0]} seeds" if tests == POOLED else whose
        title = f"Against {part['against'].iloc[0]}{whose}"
        name = "comparisons" if len(sets) == 1 else f"comparisons_{POOLED if tests == POOLED else n}"
        yield name, title, part.drop(columns="tests"), partial(forests.forest, unit=unit)


def _drawn(name: str, title: str, table: pd.DataFrame, figure: Callable[[pd.DataFrame], Any], output: Path) -> Picture:
    path = output / f"{name}.png"
    table.to_csv(path.with_suffix(".csv"), index=False)
    caption = next(text for prefix, text in CAPTIONS.items() if name.startswith(prefix))
    return Picture(name, title, caption, table, path, figures.save(figure(table), path))


def records(places: Mapping[str, Path], pattern: str) -> dict[tuple[str, str], Any]:
    """What the stages' outputs say of themselves, by experiment and name of their folder."""
    files = [(label, file) for label, folder in places.items() for file in sorted(folder.glob(pattern))]
    return {(label, file.parent.name): read_json(file) for label, file in files}


def cost(places: Mapping[str, Path]) -> pd.DataFrame:
    """What trainings took: experiment (where there are several), target, steps, tokens per second, hardware."""
    targets = records(places, "targets/*/fusechat.json")
    logged = {(e, run): curve for e, folder in places.items() for run, curve in training_curves(folder).items()}
    return frames.cost({key: (made, logged.get(key)) for key, made in targets.items()}, len(places) > 1)


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
