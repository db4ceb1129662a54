"""Bits per byte, nats per token, and exact match of greedy answers on held-out chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.app.outputs import fingerprint, sealed_line, whole_lines
from fusechat.app.progress import Progress, progress
from fusechat.evaluate.kinds import EVALUATIONS, Job, Sample, Work

PART = 256  # samples between two writes: what a killed evaluation has to do again at most
Chat = Mapping[str, Any]


@EVALUATIONS.register("chats", "bits per byte, nats per token, and exact match of greedy answers")
def chats(job: Job) -> Work:
    """The chats of ``chats`` (any format that chat.path reads), of its ``split``, at most ``limit`` of them."""
    from fusechat.chats.formats import load_chats

    rows, _ = load_chats(job.settings["chats"], split=job.settings["split"], limit=job.settings["limit"])
    inputs = {"tests": fingerprint(ids=list(rows["id"])), **(job.stops() if job.settings["generate"] else {})}
    return Work(lambda part: {"samples": _measure(job, rows.to_list(), part)}, inputs)


def _measure(job: Job, rows: Sequence[Chat], part: Path) -> list[Sample]:
    """Scores and answers chat by chat; goes on after those that ``part`` holds from a killed run."""
    model, renderer = job.load()
    done: list[Sample] = whole_lines(part)
    with progress(f"evaluate {job.name}", len(rows), "chats", len(done)) as tell:
        for start in range(len(done), len(rows), PART):
            samples = _samples(model, renderer, rows[start : start + PART], job.settings, tell)
            with part.open("a", encoding="utf-8") as file:
                file.writelines(sealed_line(sample) for sample in samples)
            done += samples
    return done


def _samples(
    model: Any, renderer: Any, rows: Sequence[Chat], settings: Mapping[str, Any], tell: Progress
) -> list[Sample]:
    """Chats are told when they are answered, or scored where that is all."""
    from fusechat.evaluate import generation, perplexity

    size = settings["batch_size"]
    scores = perplexity.score(model, renderer, [row["messages"] for row in rows], size)
    samples = [{"id": row["id"], "tag": row["tag"], **score} for row, score in zip(rows, scores, strict=True)]
    if not settings["generate"]:
        tell(len(rows))
        return samples
    prompts, limit = [row["messages"][:-1] for row in rows], settings["max_new_tokens"]
    answers = generation.generate(model, renderer, prompts, max_new_tokens=limit, batch_size=size, tell=tell)
    for sample, row, answer in zip(samples, rows, answers, strict=True):
        question, reference = (message["content"] for message in row["messages"][-2:])
        correct = answer == reference.strip()
        sample |= {"prompt": question, "reference": reference, "answer": answer, "correct": correct}
    return samples
