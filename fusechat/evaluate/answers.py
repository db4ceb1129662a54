"""Answers in the files that FastChat's llm_judge (MT-Bench) and alpaca_eval read, so that their own judges can score them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.chats.render import Message

Question = dict[str, Any]
Generate = Callable[[list[list[Message]], float], list[str]]
PART = 16  # questions between two writes
TEMPERATURES = {  # of MT-Bench's categories, as published
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHERWISE = 0.7


def load_questions(path: Path, kind: str) -> list[Question]:
    """The user's question file: JSON lines with question_id and turns (mt_bench), or a JSON list with instruction (alpaca_eval)."""
    if not path.is_file():
        raise UserError(
            f"evaluation.questions={path} does not exist; download the question file of {kind} and name it here"
        )
    text = path.read_text(encoding="utf-8")
    try:
        found = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    needed = {"mt_bench": {"question_id", "turns"}, "alpaca_eval": {"instruction"}}[kind]
    for number, question in enumerate(found, 1):
        if not isinstance(question, dict) or not needed <= set(question):
            raise UserError(f"{path}, question {number}: expected the keys {', '.join(sorted(needed))} of {kind}")
    return list(found)


def mt_bench(questions: Sequence[Question], generate: Generate, model_id: str) -> Iterator[dict[str, Any]]:
    """Every turn of every question, each category at its temperature; one record a question, as llm_judge has them."""
    for start in range(0, len(questions), PART):
        part = questions[start : start + PART]
        talks: list[list[Message]] = [[] for _ in part]
        for turn in range(max(len(question["turns"]) for question in part)):
            for temperature in sorted({_temperature(question) for question in part}):
                asked = [i for i, q in enumerate(part) if _temperature(q) == temperature and turn < len(q["turns"])]
                for i in asked:
                    talks[i].append({"role": "user", "content": part[i]["turns"][turn]})
                for i, answer in zip(asked, generate([talks[i] for i in asked], temperature), strict=True):
                    talks[i].append({"role": "assistant", "content": answer})
        for question, talk in zip(part, talks, strict=True):
            turns = [message["content"] for message in talk if message["role"] == "assistant"]
            answer_id = hashlib.sha256(json.dumps([model_id, question["question_id"], turns]).encode()).hexdigest()[:22]
            yield {
                "question_id": question["question_id"],
                "answer_id": answer_id,
                "model_id": model_id,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": 0,
            }


def alpaca_eval(
    questions: Sequence[Question], generate: Generate, model_id: str, temperature: float
) -> Iterator[dict[str, Any]]:
    """One answer an instruction, as alpaca_eval's model_outputs have them."""
    for start in range(0, len(questions), PART):
        part = questions[start : start + PART]
        prompts = [[{"role": "user", "content": question["instruction"]}] for question in part]
        for question, output in zip(part, generate(prompts, temperature), strict=True):
            kept: dict[str, Any] = {key: question[key] for key in ("dataset", "datasplit") if key in question}
            yield {"instruction": question["instruction"], "output": output, "generator": model_id} | kept


def _temperature(question: Question) -> float:
    return float(question.get("temperature", TEMPERATURES.get(question.get("category", ""), OTHERWISE)))
