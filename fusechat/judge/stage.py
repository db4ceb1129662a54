"""Judging an answer file: grades, or pairs with another model's, with intervals; what a kill left is gone on with."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.app.endpoint import in_flight
from fusechat.app.errors import UserError
from fusechat.app.outputs import fingerprint, sealed_line, settled, stamp, whole_lines, write_json
from fusechat.app.places import writes
from fusechat.app.settings import check as check_settings
from fusechat.judge.endpoint import Judge, Task, tasks
from fusechat.judge.files import asked_of, read_answers, read_questions

LOG = logging.getLogger(__name__)
Judgement = dict[str, Any]


@writes("judge", reads=("answers", "questions", "baseline"), output="output_file")
def judge(
    answers: str | Path,
    output_file: str | Path,
    *,
    base_url: str,
    model: str,
    questions: str | Path | None = None,
    baseline: str | Path | None = None,
    key: str | None = None,
    repeats: int = 1,
    temperature: float = 0.0,
    max_tokens: int = 512,
    parallel: int = 4,
    retries: int = 6,
    wait: float = 1.0,
    tries: int = 3,
    max_bad_fraction: float = 0.05,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
) -> Mapping[str, Any]:
    """Judges an answer file of mt_bench or alpaca_eval; writes ``output_file`` (JSON) and returns what it holds.

    ``metrics``: the mean grade from 1 to 10, or with ``baseline`` (another answer file) the win rate, with 95 %
    intervals per category; ``spread``: the deviation of the mean from repeat to repeat. base_url: an OpenAI-compatible
    endpoint up to and with /v1; key: its bearer token. parallel: requests under way; retries, wait (seconds): after
    429, 5xx and broken connections; tries: questions asked again where a judgement holds no grade; max_bad_fraction:
    of judgements without one. A result of the same prompts and judge is kept; others are refused unless ``overwrite``.
    """
    check_settings("judge", repeats=repeats, parallel=parallel, max_bad_fraction=max_bad_fraction)
    todo = plan(answers, baseline, questions, repeats)
    asked = {"base_url": base_url, "model": model, "repeats": repeats}
    asked |= {"temperature": temperature, "max_tokens": max_tokens}
    mark, output = fingerprint(prompts=[task.prompt for task in todo], judge=asked), Path(output_file)
    held = settled(output, mark, what="judgement", keep="judge.suffix=_NAME", overwrite=overwrite)
    if held is not None:
        return held
    part = output.with_suffix(f".{mark}.part")
    done = {line["key"]: line for line in whole_lines(part)}
    options: dict[str, Any] = {
        "temperature": temperature,
        "max_tokens": max_tokens,
        "retries": retries,
        "wait": wait,
        "tries": tries,
    }
    with Judge(base_url, model, key, **options) as ask, part.open("a", encoding="utf-8") as file:
        for judgement in in_flight(ask, [task for task in todo if task.key not in done], parallel):
            file.write(sealed_line(judgement))
            file.flush()
            done[judgement["key"]] = judgement
            check(list(done.values()), len(todo), max_bad_fraction)
    about = {**stamp(mark), "stage": "judge", "kind": "judge", "name": output.stem}
    about |= {"answers": str(answers), "model": str(answers)}
    judgements = [done[task.key] for task in todo]
    content = {**about, **summary(judgements, "win_rate" if baseline else "grade"), **(record or {})}
    write_json(output, content)
    part.unlink()
    return content


def plan(answers: str | Path, baseline: str | Path | None, questions: str | Path | None, repeats: int) -> list[Task]:
    """Every judgement to be made. Raises `UserError` where the files do not fit together."""
    asked = Path(questions) if questions else None
    given = read_answers(Path(answers), asked)
    others = read_answers(Path(baseline), asked) if baseline else None
    if others is not None and asked_of(others) != asked_of(given):
        hint = "write both with the same evaluation.questions"
        raise UserError(f"{answers} and {baseline} answer different questions; {hint}")
    known = read_questions(asked)
    references = {name: [str(text) for text in q.get("reference") or []] for name, q in known.items()}
    tags = {name: str(q.get("category", "")) for name, q in known.items()}
    return [*tasks(given, others, tags, references, repeats)]


def check(done: Sequence[Judgement], total: int, fraction: float) -> None:
    """Raises `UserError` where too many judgements hold no grade."""
    bad = [line for line in done if line["value"] is None]
    if len(bad) > fraction * total:
        raise UserError(
            f"{len(bad)} of {total} judgements hold no grade, more than judge.max_bad_fraction={fraction}; "
            f"the last began {bad[-1]['verdict'][:80]!r}: is judge.model a chat model?"
        )


def summary(judgements: Sequence[Judgement], name: str) -> dict[str, Any]:
    """Samples (a judged turn each: the mean of its judgements), their metric, and its spread over the repeats."""
    import numpy as np

    from fusechat.report.results import metrics

    values: dict[str, list[float]] = defaultdict(list)
    repeats: dict[str, list[float]] = defaultdict(list)
    tags = {}
    for line in judgements:
        if line["value"] is not None:
            sample = line["sample"]
            values[sample].append(line["value"])
            repeats[line["key"].removeprefix(sample).split("/")[1]].append(line["value"])
            tags[sample] = line["tag"]
    samples = [{"id": sample, "tag": tags[sample], name: float(np.mean(found))} for sample, found in values.items()]
    means = [np.mean(found) for found in repeats.values()]
    return {
        "tests": fingerprint(ids=[sample["id"] for sample in samples]),
        "metrics": metrics(samples, [name]),
        "spread": float(np.std(means, ddof=1)) if len(means) > 1 else 0.0,
        "without_grade": [line["key"] for line in judgements if line["value"] is None],
        "samples": samples,
        "judgements": [*judgements],
    }
