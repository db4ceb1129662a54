"""One's own results beside published ones, so that a reader sees at once whether they agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fusechat.app.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

PACKAGE = Path(__file__).parents[1]
METRICS = ("bits per byte", "accuracy %")


def beside(table: pd.DataFrame, file: str | Path, seed: int) -> pd.DataFrame:
    """For each model and metric that both have: here, published, difference, published 95 % interval, within or not.

    table: as `table_of` makes it. file: a CSV of the same columns and ``seed``, below the package or anywhere.
    Empty where nothing was published for this seed. Raises `UserError` where there is no such file.
    """
    import pandas as pd

    path = PACKAGE / file if (PACKAGE / file).is_file() else Path(file)
    if not path.is_file():
        raise UserError(f"report.published={file} does not exist; give a CSV of published results, or null")
    published = pd.read_csv(path)
    both = table.merge(published[published["seed"] == seed], on="model", suffixes=("", " published"))
    lines = []
    for metric in (metric for metric in METRICS if f"{metric} published" in both):
        for _, row in both.iterrows():
            here, there, interval = row[metric], row[f"{metric} published"], str(row[f"{metric} 95 % published"])
            low, high = (float(value) for value in interval.split("–"))
            digits = 1 if "%" in metric else 4
            line = {"model": row["model"], "metric": metric, "here": here, "published": there}
            within = "yes" if low <= here <= high else "NO"
            lines.append(line | {"difference": round(here - there, digits), "95 %": interval, "within": within})
    return pd.DataFrame(lines)
