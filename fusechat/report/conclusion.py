"""What the comparisons say, in sentences that are computed and never written by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusechat.report.comparisons import MADE
from fusechat.report.results import LOWER_IS_BETTER

if TYPE_CHECKING:
    import pandas as pd


def conclusion(comparisons: pd.DataFrame) -> str:
    """Each kind's verdicts against the baseline, and the best of them with its interval. Empty without comparisons.

    comparisons: as `fusechat.report.comparisons.comparisons` makes them; of several test sets the first one's count,
    which are the pooled ones where there are some.
    """
    if len(comparisons):
        comparisons = comparisons[comparisons["tests"] == comparisons["tests"].iloc[0]]
    parts = [_of_kind(comparisons[comparisons["kind"] == kind], kind) for kind in MADE] if len(comparisons) else []
    return " ".join(part for part in parts if part)


def _of_kind(rows: pd.DataFrame, kind: str) -> str:
    if not len(rows):
        return ""
    metric, against = str(rows["metric"].iloc[0]), rows["against"].iloc[0]
    best = rows.loc[rows["difference"].idxmin() if metric in LOWER_IS_BETTER else rows["difference"].idxmax()]
    counts = {verdict: int((rows["verdict"] == verdict).sum()) for verdict in ("better", "worse", "within noise")}
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    apart = f"{abs(best['difference']):.4f} {'below' if best['difference'] < 0 else 'above'}"
    interval = f"95 % interval of the difference {best['low']:+.4f} to {best['high']:+.4f}"
    chosen = ", picked on these very chats" if len(rows) > 1 else ""
    said = f"{best['model']}, lies {apart} it in {metric.replace('_', ' ')} ({interval}{chosen})"
    return f"{kind.capitalize()} against {against}: {told}; the best of them, {said}."
