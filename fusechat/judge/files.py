"""Answer files and question files of MT-Bench and alpaca_eval, as a judge reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.texts import json_rows
from fusechat.evaluate.answers import load_questions
from fusechat.evaluate.notes import check_answers

Turns = list[tuple[str, str]]  # (question, answer), turn by turn
Questions = dict[str, dict[str, Any]]  # by id


def read_questions(path: Path | None) -> Questions:
    """Questions by id: their own (mt_bench), or their place in the file (alpaca_eval); none without a file."""
    if path is None:
        return {}
    if path.is_file() and json_rows(path)[1]:
        rows = load_questions(path, "alpaca_eval")
        return {str(n): {"category": row.get("dataset", "")} for n, row in enumerate(rows)}
    return {str(row["question_id"]): row for row in load_questions(path, "mt_bench")}


def read_answers(path: Path, questions: Path | None) -> dict[str, Turns]:
    """Question id -> its turns, from an answer file. Raises `UserError` where the file and the questions do not fit."""
    if not path.is_file():
        hint = "write it with: python -m fusechat.evaluate model=DIR evaluation=mt_bench"
        raise UserError(f"{path} does not exist; {hint}")
    check_answers(path)
    rows, listed = json_rows(path)
    if not rows:
        raise UserError(f"{path} holds no answers; write it with: python -m fusechat.evaluate")
    if listed:
        return {str(n): [_alpaca_turn(row, f"{path}, answer {n + 1}")] for n, row in enumerate(rows)}
    known, found = read_questions(questions), {}
    for number, row in enumerate(rows, 1):
        name, given = _mt_bench_turns(row, f"{path}, answer {number}")
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


def _alpaca_turn(row: Any, where: str) -> tuple[str, str]:
    """A record of alpaca_eval's model_outputs. Raises `UserError` where it is none."""
    match row:
        case {"instruction": str(asked), "output": str(answer)}:
            return asked, answer
    raise UserError(f"{where}: expected instruction and output, the texts of alpaca_eval's model_outputs")


def _mt_bench_turns(row: Any, where: str) -> tuple[str, list[str]]:
    """Question id and answers of a record of llm_judge's model_answer. Raises `UserError` where it is none."""
    match row:
        case {"question_id": name, "choices": [{"turns": [*turns]}, *_]} if all(isinstance(t, str) for t in turns):
            return str(name), turns
    raise UserError(f"{where}: expected question_id and choices: [{{turns: [..]}}] of llm_judge's model_answer")


def asked_of(turns: dict[str, Turns]) -> dict[str, list[str]]:
    """The questions alone."""
    return {name: [question for question, _ in asked] for name, asked in turns.items()}
