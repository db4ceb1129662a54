"""A report on one or several experiments' folders, and the comparison of two result files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fusechat.app.errors import UserError
from fusechat.report import results

if TYPE_CHECKING:
    import pandas as pd

    from fusechat.report.pictures import Picture

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
    baseline: str = "",
    title: str = "results",
    hint: str = EVALUATE,
    made_by: str = "",
) -> Report:
    """Writes results.csv, results.md, figures with a CSV each, and index.html about everything under the folders.

    metric: sorts the table and is compared with the evaluation ``baseline`` (the first one where that is missing),
    paired on the same samples. hint: the command that makes an evaluation, for the `UserError` where there is none.
    made_by: the command, shown at the page's end.
    """
    from fusechat.report.conclusion import conclusion
    from fusechat.report.page import page
    from fusechat.report.pictures import draw
    from fusechat.report.table import table_of

    places, output = [Path(folder) for folder in folders], Path(output_dir)
    rows = results.collect(places)
    if not rows:
        raise UserError(f"{places[0]} holds no evaluations; make one with: {hint}")
    rows = results.ordered(rows, metric)
    output.mkdir(parents=True, exist_ok=True)
    table, comparisons = table_of(rows), results.comparisons(rows, baseline, metric)
    table.to_csv(output / "results.csv", index=False)
    (output / "results.md").write_text(results.markdown(table))
    pictures = draw(places, rows, comparisons, output)
    said = conclusion(comparisons)
    (output / "index.html").write_text(page(title, said, table, pictures, made_by), encoding="utf-8")
    return Report(table, comparisons, said, pictures, output / "index.html")


def compare(first: str | Path, second: str | Path, output_file: str | Path | None = None) -> pd.DataFrame:
    """second - first, for each metric that both result files have and each skill, paired on the same samples.

    Columns: both values, difference, low and high of its 95 % bootstrap interval, p, and whether it is within noise.
    Raises `UserError` where a file is no result or the two are of different test sets.
    """
    frame = results.compared(results.read_result(Path(first)), results.read_result(Path(second)))
    if output_file:
        Path(output_file).parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(output_file, index=False)
    return frame
