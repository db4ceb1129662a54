"""Answers in the files that FastChat's llm_judge (MT-Bench) and alpaca_eval read, for their own judges to score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from fusechat.app.checksums import check_first_use
from fusechat.app.errors import UserError
from fusechat.app.outputs import file_hash, sealed_line, whole_lines, write_durably
from fusechat.app.progress import progress
from fusechat.app.texts import json_rows
from fusechat.chats.roles import Message
from fusechat.evaluate.kinds import EVALUATIONS, Job, Work

Question = dict[str, Any]
Generate = Callable[[list[list[Message]], float], list[str]]  # prompts, temperature -> answers
Records = Callable[[Sequence[Question], Generate], Iterator[dict[str, Any]]]
PART = 16  # questions between two writes
GREEDY = ("extraction", "math", "coding", "reasoning")
TEMPERATURES = dict.fromkeys(GREEDY, 0.0) | {"stem": 0.1, "humanities": 0.1}  # of MT-Bench's categories, as published
OTHERWISE = 0.7  # writing, roleplay, and categories that MT-Bench does not have


@EVALUATIONS.register("mt_bench", "two-turn answers for FastChat's llm_judge, each category at its temperature")
def mt_bench(job: Job) -> Work:
    """Records of llm_judge's model_answer, one a question."""

    def records(left: Sequence[Question], ask: Generate) -> Iterator[dict[str, Any]]:
        return mt_bench_records(left, ask, job.name)

    return _work(job, records, "lines")


@EVALUATIONS.register("alpaca_eval", "one answer an instruction, for alpaca_eval's annotators")
def alpaca_eval(job: Job) -> Work:
    """Records of alpaca_eval's model_outputs, one an instruction."""

    def records(left: Sequence[Question], ask: Generate) -> Iterator[dict[str, Any]]:
        return alpaca_eval_records(left, ask, job.name, job.settings["temperature"])

    return _work(job, records, "list")


def _work(job: Job, records: Records, form: Literal["lines", "list"]) -> Work:
    path = Path(job.settings["questions"])
    questions = load_questions(path, job.settings["kind"])

    def measure(part: Path) -> dict[str, Any]:
        done = whole_lines(part)
        done = done[: len(done) - len(done) % PART]  # questions are asked in parts: the same parts again
        write_durably(part, "".join(map(sealed_line, done)).encode())
        shown = progress(f"evaluate {job.name}", len(questions), "questions", len(done))
        with job.speaker() as speaker, shown as tell, part.open("a", encoding="utf-8") as file:
            for record in records(questions[len(done) :], speaker.answer):
                file.write(sealed_line(record))
                file.flush()
                tell()
        return {"samples": whole_lines(part)}

    return Work(measure, {"questions": file_hash(path)}, job.stops, form, known=("questions",))


def load_questions(path: Path, kind: str) -> list[Question]:
    """The user's question file.

    JSON lines with question_id and turns (mt_bench), or a JSON list with instruction (alpaca_eval). Raises `UserError`.
    """
    if not path.is_file():
        raise UserError(
            f"evaluation.questions={path} does not exist; download the question file of {kind} and name it here"
        )
    check_first_use(path)
    found, _ = json_rows(path)
    if not found:
        raise UserError(f"{path} holds no questions; name the question file of {kind}")
    needed = {"mt_bench": {"question_id", "turns"}, "alpaca_eval": {"instruction"}}[kind]
    for number, question in enumerate(found, 1):
        if not isinstance(question, dict) or not needed <= set(question):
            raise UserError(f"{path}, question {number}: expected the keys {', '.join(sorted(needed))} of {kind}")
        texts = question["turns"] if kind == "mt_bench" else [question["instruction"]]
        if not (isinstance(texts, list) and texts and all(isinstance(text, str) and text for text in texts)):
            said = "turns: a list of questions" if kind == "mt_bench" else "instruction: a text"
            raise UserError(f"{path}, question {number}: expected {said}, found {texts!r:.60}")
    return found


def mt_bench_records(questions: Sequence[Question], generate: Generate, model_id: str) -> Iterator[dict[str, Any]]:
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


def alpaca_eval_records(
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
