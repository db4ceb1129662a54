"""What the models answer to the same questions, beside each other."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusechat.report.results import short

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 3  # questions of each test set
TOLD = (
    "The chats at the beginning, in the middle and at the end of the test set, whatever the models make of them; the "
)
TOLD += "conversation before a question is left out. Numbers: <a href='answers.csv'>answers.csv</a>."


def answers(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Columns: experiment, id (the chat's), question, reference, model, answer; a row an answer, question by question.

    rows: of `results.collect`. Empty where no evaluation has generated.
    """
    import pandas as pd

    found: dict[tuple[str, str, Any], list[dict[str, Any]]] = {}
    for row in rows:
        told = [sample for sample in row["samples"] if "answer" in sample and "prompt" in sample]
        for sample in spread(told):
            key = row["folder"], row["tests"], sample["id"]
            about = {"experiment": row["folder"], "id": sample["id"], "question": sample["prompt"]}
            about |= {"reference": sample["reference"], "model": short(row["name"]), "answer": sample["answer"]}
            found.setdefault(key, []).append(about)
    return pd.DataFrame([line for lines in found.values() for line in lines])


def spread(samples: Sequence[Any]) -> list[Any]:
    """First, middle and last; fewer where there are fewer."""
    last = len(samples) - 1
    return [samples[n] for n in sorted({round(part * last / (SHOWN - 1)) for part in range(SHOWN)})] if samples else []


def section(frame: pd.DataFrame) -> str:
    """The page's part: each question with its reference and every model's answer; empty for no answers."""
    if not len(frame):
        return ""
    parts = ["<h2>Answers</h2>"]
    for _, lines in frame.groupby(["experiment", "id", "question"], sort=False):
        first = lines.iloc[0]
        pairs = [("reference", first["reference"]), *zip(lines["model"], lines["answer"], strict=True)]
        told = "".join(f"<dt>{html.escape(str(who))}<dd>{html.escape(str(text))}" for who, text in pairs)
        of = f" ({html.escape(first['experiment'])})" if frame["experiment"].nunique() > 1 else ""
        parts.append(f"<section class=asked><p>{html.escape(first['question'])}{of}</p><dl>{told}</dl></section>")
    return f"{''.join(parts)}<p class=note>{TOLD}</p>"
