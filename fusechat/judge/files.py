"""Answer files and question files of MT-Bench and alpaca_eval, as a judge reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.evaluate.answers import load_questions
from fusechat.evaluate.stage import check_answers

Turns = list[tuple[str, str]]  # (question, answer), turn by turn
Questions = dict[str, dict[str, Any]]  # by id


def read_questions(path: Path | None) -> Questions:
    """Questions by id: their own (mt_bench), or their place in the file (alpaca_eval); none without a file."""
    if path is None:
        return {}
    if path.is_file() and _is_list(path.read_text(encoding="utf-8")):
        rows = load_questions(path, "alpaca_eval")
        return {str(n): {"category": row.get("dataset", "")} for n, row in enumerate(rows)}
    return {str(row["question_id"]): row for row in load_questions(path, "mt_bench")}


def read_answers(path: Path, questions: Path | None) -> dict[str, Turns]:
    """Question id -> its turns, from an answer file. Raises `UserError` where the file and the questions do not fit."""
    if not path.is_file():
        hint = "write it with: python -m fusechat.evaluate model=DIR evaluation=mt_bench"
        raise UserError(f"{path} does not exist; {hint}")
    check_answers(path)
    text = path.read_text(encoding="utf-8")
    if _is_list(text):
        return {str(n): [(row["instruction"], row["output"])] for n, row in enumerate(json.loads(text))}
    known, found = read_questions(questions), {}
    for row in (json.loads(line) for line in text.split("\n") if line.strip()):
        name, given = str(row["question_id"]), row["choices"][0]["turns"]
        if name not in known:
            lacking = f"{path} answers question {name}, which questions={questions} lacks"
            raise UserError(f"{lacking}; give the question file it was made with")
        asked = known[name]["turns"]
        if len(given) != len(asked):
            raise UserError(
                f"{path} has {len(given)} answers to the {len(asked)} turns of question {name}; write it again"
            )
        found[name] = [*zip(asked, given, strict=True)]
    return found


def asked_of(turns: dict[str, Turns]) -> dict[str, list[str]]:
    """The questions alone."""
    return {name: [question for question, _ in asked] for name, asked in turns.items()}


def _is_list(text: str) -> bool:
    return text.lstrip().startswith("[")
