"""A report on one or several experiments' folders, and the comparison of two result files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fusechat.app.errors import UserError
from fusechat.app.labels import labels as labels_of
from fusechat.app.outputs import RECORD, whole_directory, write_durably, write_json
from fusechat.app.places import writes, writing
from fusechat.report import results

if TYPE_CHECKING:
    import pandas as pd

    from fusechat.report.pictures import Picture

LOG = logging.getLogger(__name__)
READS = ("distributions", "aligned", "targets", "merged", "evaluation", "logs", "world", "checkpoints")  # of a run
EVALUATE = "python -m fusechat.evaluate model=DIR"


@dataclass(frozen=True)
class Report:
    """What a report shows: a row a model, each model against the baseline, what follows, figures, and the page."""

    table: pd.DataFrame
    comparisons: pd.DataFrame
    conclusion: str
    pictures: Sequence[Picture]
    page: Path


def report(
    folders: Sequence[str | Path],
    output_dir: str | Path,
    *,
    metric: str = "bits_per_byte",
    baseline: str | None = None,
    title: str = "results",
    labels: Sequence[str] | None = None,
    hint: str = EVALUATE,
    made_by: str = "",
) -> Report:
    """Writes results.csv, results.md, figures with a CSV each, and index.html about everything under the folders.

    metric: sorts the table and is compared with the evaluation ``baseline`` (see `comparisons.comparisons`),
    paired on the same samples. hint: the command that makes an evaluation, for the `UserError` where there is none.
    made_by: the command, shown at the page's end. labels: what the folders are called, where their names do not do.
    """
    places, output = [Path(folder) for folder in folders], Path(output_dir)
    reads = [place / part for place in places for part in READS]
    with writing(output, "report", reads=reads, known=is_report):
        return _report(_labelled(places, labels), output, metric, baseline, title, hint, made_by)


def _labelled(places: Sequence[Path], given: Sequence[str] | None) -> dict[str, Path]:
    """Label -> folder. Raises `UserError` for another number of labels than folders."""
    if given and len(given) != len(places):
        raise UserError(f"report.labels has {len(given)} names for {len(places)} runs; give one for each")
    return dict(zip(given or labels_of(places), places, strict=True))


def is_report(folder: Path) -> bool:
    """Whether a folder without a record is a report all the same."""
    kinds = {path.suffix for path in folder.iterdir()}
    return (folder / "results.csv").exists() and kinds <= {".csv", ".md", ".html", ".png", ".svg"}


def _report(
    places: Mapping[str, Path], output: Path, metric: str, baseline: str | None, title: str, hint: str, made_by: str
) -> Report:
    from fusechat.report.answers import answers
    from fusechat.report.comparisons import comparisons
    from fusechat.report.conclusion import conclusion
    from fusechat.report.page import made_from, page
    from fusechat.report.pictures import cost, draw
    from fusechat.report.table import table_of

    rows = results.collect(places)
    if not rows:
        raise UserError(f"{next(iter(places.values()))} holds no evaluations; make one with: {hint}")
    rows = results.ordered(rows, metric)
    table, rows = table_of(rows), results.by_experiment(rows, [*places])
    compared, spent, answered = comparisons(rows, baseline, metric), cost(places), answers(rows)
    with whole_directory(output, overwrite=True) as directory:
        table.to_csv(directory / "results.csv", index=False)
        for name, frame in {"cost": spent, "answers": answered}.items():
            if len(frame):
                frame.to_csv(directory / f"{name}.csv", index=False)
        (directory / "results.md").write_text(results.markdown(table))
        pictures = draw(places, rows, compared, metric, baseline, directory)
        said, about = conclusion(compared), made_from(places, made_by)
        shown = page(title, said, table, spent, pictures, answered, about)
        (directory / "index.html").write_text(shown, encoding="utf-8")
        write_json(directory / RECORD, {"stage": "report"})
    _tell_on_cards({Path(row["model"]): Path(row["result"]).parent for row in rows})
    drawn = [replace(picture, path=output / picture.path.name) for picture in pictures]
    return Report(table, compared, said, drawn, output / "index.html")


def _tell_on_cards(evaluated: Mapping[Path, Path]) -> None:
    """Writes what was measured on the cards of models of ours; a card that cannot be written stays as it is, and one
    that is no card any more is named.

    evaluated: model -> the folder with its evaluations.
    """
    from yaml import YAMLError

    from fusechat.models.cards import CARD, measured_card

    for model, evaluations in evaluated.items():
        if (model / RECORD).exists() and (model / CARD).exists():
            found = results.results_of(evaluations, model)
            try:
                for left in model.glob(f".{CARD}.*.tmp"):  # of a report that was killed
                    left.unlink(missing_ok=True)
                write_durably(model / CARD, measured_card(model, found).encode())
            except OSError:
                continue
            except (ValueError, YAMLError) as error:
                told = " ".join(str(error).split())
                LOG.warning("%s cannot be read (%s): it gets no scores; mend its text", model / CARD, told)


def is_comparison(file: Path) -> bool:
    """Whether a file is a comparison, by its header."""
    with file.open("rb") as opened:
        return opened.readline().startswith(b"metric,skill,first,second,")


@writes("compare", reads=("first", "second"), output="output_file", known=is_comparison)
def compare(first: str | Path, second: str | Path, output_file: str | Path | None = None) -> pd.DataFrame:
    """second - first, for each metric that both result files have and each skill, paired on the same samples.

    Columns: both values, difference, low and high of its 95 % bootstrap interval, p, and whether it is within noise.
    Raises `UserError` where a file is no result or the two are of different test sets.
    """
    frame = results.compared(results.read_result(Path(first)), results.read_result(Path(second)))
    if output_file:
        write_durably(Path(output_file), frame.to_csv(index=False).encode())
    return frame
