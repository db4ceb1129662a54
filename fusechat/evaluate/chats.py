"""Bits per byte, nats per token, and exact match of greedy answers on held-out chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.outputs import fingerprint, sealed_line, whole_lines
from fusechat.app.progress import Progress, progress
from fusechat.chats.roles import Message
from fusechat.evaluate.kinds import EVALUATIONS, Job, Sample, Work
from fusechat.evaluate.speakers import Speaker

PART = 256  # samples between two writes: what a killed evaluation has to do again at most
Chat = Mapping[str, Any]


@EVALUATIONS.register("chats", "bits per byte, nats per token, and exact match of greedy answers")
def chats(job: Job) -> Work:
    """The chats of ``chats`` (any format that chat.path reads), of its ``split``, at most ``limit`` of them."""
    from fusechat.chats.formats import load_chats

    asked = {key: job.settings[key] for key in ("split", "limit")}
    try:
        rows, _ = load_chats(job.settings["chats"], **asked, seed=job.settings.get("chats_seed", 0))
    except UserError as error:
        raise UserError(f"evaluation.chats: {error}") from error
    if job.settings["generate"] and (silent := [n for n, talk in enumerate(rows["messages"]) if not _answer_at(talk)]):
        told = f"{len(silent)} of {len(rows)} chats hold no answer to a question (the first: {silent[0]})"
        raise UserError(
            f"evaluation.chats: {told}, and evaluation.generate=true asks these again; "
            "leave them out, or set evaluation.generate=false"
        )
    inputs = {"tests": fingerprint(ids=list(rows["id"])), "tags": fingerprint(tags=list(rows["tag"]))}
    read = job.stops if job.settings["generate"] else dict
    return Work(lambda part: {"samples": _measure(job, rows.to_list(), part)}, inputs, read, known=("chats",))


def _measure(job: Job, rows: Sequence[Chat], part: Path) -> list[Sample]:
    """Scores and answers chat by chat; goes on after those that ``part`` holds from a killed run."""
    done: list[Sample] = whole_lines(part)
    shown = progress(f"evaluate {job.name}", len(rows), "chats", len(done))
    with job.speaker() as speaker, shown as tell:
        for start in range(len(done), len(rows), PART):
            samples = _samples(speaker, rows[start : start + PART], job.settings["generate"], tell)
            with part.open("a", encoding="utf-8") as file:
                file.writelines(sealed_line(sample) for sample in samples)
            done += samples
    return done


def _samples(speaker: Speaker, rows: Sequence[Chat], generate: bool, tell: Progress) -> list[Sample]:
    """Chats are told when they are answered, or scored where that is all."""
    scores = speaker.score([row["messages"] for row in rows])
    samples = [{"id": row["id"], "tag": row["tag"], **score} for row, score in zip(rows, scores, strict=True)]
    if not generate:
        tell(len(rows))
        return samples
    talks = [row["messages"][: _answer_at(row["messages"]) + 1] for row in rows]
    answers = speaker.answer([talk[:-1] for talk in talks], tell=tell)
    for sample, talk, answer in zip(samples, talks, answers, strict=True):
        question, reference = (message["content"] for message in talk[-2:])
        correct = answer == reference.strip()
        sample |= {"prompt": question, "reference": reference, "answer": answer, "correct": correct}
    return samples


def _answer_at(talk: Sequence[Message]) -> int:
    """The place of a chat's last answer, which is asked for again; 0 where there is none, or no question before it."""
    return max((place for place, message in enumerate(talk) if message["role"] == "assistant"), default=0)
