"""Judge answer files with a language model behind an OpenAI-compatible endpoint.

python -m fusechat.judge answers=FILE questions=FILE judge.base_url=http://localhost:8000/v1 judge.model=NAME
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fusechat.app.command import entry, plain, provenance
from fusechat.app.errors import UserError
from fusechat.app.outputs import whole_lines, write_json

LOG = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float:
    """Writes ``output_file``: mean grade (or win rate) with intervals per category, its spread over repeats. Returns the mean."""
    from fusechat.app import outputs
    from fusechat.judge import endpoint as judging
    from fusechat.report.results import metrics, read_result

    answers = turns_of(Path(cfg.answers), cfg.questions)
    others = turns_of(Path(cfg.baseline), cfg.questions) if cfg.baseline else None
    if others is not None and asked_of(others) != asked_of(answers):
        raise UserError(
            f"{cfg.answers} and {cfg.baseline} answer different questions; write both with the same evaluation.questions"
        )
    known = _questions(cfg.questions)
    references = {name: [str(r) for r in q.get("reference") or []] for name, q in known.items()}
    tags = {name: str(q.get("category", "")) for name, q in known.items()}
    todo = [*judging.tasks(answers, others, tags, references, cfg.judge.repeats)]
    asked = {
        k: v for k, v in plain(cfg.judge).items() if k in ("base_url", "model", "repeats", "temperature", "max_tokens")
    }
    mark = outputs.fingerprint(prompts=[task.prompt for task in todo], judge=asked)
    output = Path(cfg.output_file)
    name = "win_rate" if others is not None else "grade"
    if output.exists() and not cfg.overwrite:
        held = read_result(output)
        if held.get("fingerprint") != mark:
            raise UserError(
                f"{output} holds other judgements; keep both with judge.suffix=_NAME, or add overwrite=true"
            )
        LOG.info("skip: %s is judged already (fingerprint %s)", cfg.answers, mark)
        return float(held["metrics"][name]["all"]["value"])
    part = output.with_suffix(f".{mark}.part")
    done = {line["key"]: line for line in whole_lines(part)}
    options = {key: cfg.judge[key] for key in ("temperature", "max_tokens", "retries", "wait", "tries")}
    ask = judging.Judge(cfg.judge.base_url, cfg.judge.model, os.environ.get(cfg.judge.key_env), **options)
    with part.open("a") as file:
        for judgement in judging.judge_all([task for task in todo if task.key not in done], ask, cfg.judge.parallel):
            file.write(json.dumps(judgement) + "\n")
            file.flush()
            done[judgement["key"]] = judgement
            check(list(done.values()), len(todo), cfg.judge.max_bad_fraction)
    samples, spread = summed(done, [task.key for task in todo], name)
    content = {
        "fingerprint": mark,
        "stage": "judge",
        "kind": "judge",
        "name": output.stem,
        "answers": str(cfg.answers),
        "model": str(cfg.answers),
        "tests": outputs.fingerprint(ids=[s["id"] for s in samples]),
        "metrics": metrics(samples, [name]),
        "spread": spread,
        "without_grade": [key for key, line in done.items() if line["value"] is None],
        "samples": samples,
        "judgements": [done[task.key] for task in todo],
        **provenance(cfg),
    }
    write_json(output, content)
    part.unlink()
    value = float(content["metrics"][name]["all"]["value"])
    LOG.info(
        "%s: %s %.3f over %d answers, spread %.3f over %d repeats; %s",
        cfg.answers,
        name,
        value,
        len(samples),
        spread,
        asked["repeats"],
        output,
    )
    return value


def asked_of(turns: dict[str, list[tuple[str, str]]]) -> dict[str, list[str]]:
    """The questions alone."""
    return {name: [question for question, _ in asked] for name, asked in turns.items()}


def check(done: list[dict[str, Any]], total: int, fraction: float) -> None:
    """Raises `UserError` where too many judgements hold no grade."""
    bad = [line for line in done if line["value"] is None]
    if len(bad) > fraction * total:
        raise UserError(
            f"{len(bad)} of {total} judgements hold no grade, more than judge.max_bad_fraction={fraction}; "
            f"the last began {bad[-1]['verdict'][:80]!r}: is judge.model a chat model?"
        )


def summed(done: dict[str, Any], keys: list[str], name: str) -> tuple[list[dict[str, Any]], float]:
    """One sample per judged turn, the mean of its judgements; and the deviation of the whole mean from repeat to repeat."""
    import numpy as np

    values: dict[str, list[float]] = defaultdict(list)
    repeats: dict[str, list[float]] = defaultdict(list)
    tags = {}
    for key in keys:
        line = done[key]
        if line["value"] is not None:
            values[line["sample"]].append(line["value"])
            repeats[key.removeprefix(line["sample"]).split("/")[1]].append(line["value"])
            tags[line["sample"]] = line["tag"]
    samples = [{"id": sample, "tag": tags[sample], name: float(np.mean(found))} for sample, found in values.items()]
    means = [np.mean(found) for found in repeats.values()]
    return samples, float(np.std(means, ddof=1)) if len(means) > 1 else 0.0


def turns_of(path: Path, questions: str | None) -> dict[str, list[tuple[str, str]]]:
    """Question id -> (question, answer) turn by turn, from an mt_bench or alpaca_eval answer file."""
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; write it with: python -m fusechat.evaluate model=DIR evaluation=mt_bench"
        )
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return {str(n): [(row["instruction"], row["output"])] for n, row in enumerate(json.loads(text))}
    known, found = _questions(questions), {}
    for row in (json.loads(line) for line in text.split("\n") if line.strip()):
        name = str(row["question_id"])
        if name not in known:
            raise UserError(
                f"{path} answers question {name}, which questions={questions} lacks; give the question file it was made with"
            )
        given = row["choices"][0]["turns"]
        if len(given) != len(known[name]["turns"]):
            raise UserError(
                f"{path} has {len(given)} answers to the {len(known[name]['turns'])} turns of question {name}; write it again"
            )
        found[name] = [*zip(known[name]["turns"], given, strict=True)]
    return found


def _questions(path: str | None) -> dict[str, dict[str, Any]]:
    from fusechat.evaluate.answers import load_questions

    if not path:
        return {}
    if Path(path).is_file() and Path(path).read_text(encoding="utf-8").lstrip().startswith("["):
        return {
            str(n): {"category": q.get("dataset", "")} for n, q in enumerate(load_questions(Path(path), "alpaca_eval"))
        }
    return {str(q["question_id"]): q for q in load_questions(Path(path), "mt_bench")}


main = entry("judge")(run)
if __name__ == "__main__":
    main()
