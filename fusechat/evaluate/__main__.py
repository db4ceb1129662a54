"""Evaluate any Hugging Face model on held-out chats.

python -m fusechat.evaluate experiment=tiny model=DIR
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fusechat.app.command import entry, label, plain, provenance, seed_everything
from fusechat.app.errors import UserError, one_of
from fusechat.app.outputs import whole_lines, write_json, write_lines
from fusechat.app.tracking import log_made, wandb_run

LOG = logging.getLogger(__name__)
PART = 256  # samples between two writes: what a killed evaluation has to do again at most


def run(cfg: DictConfig) -> float | None:
    """Writes ``output_file`` by the evaluation that ``evaluation.kind`` names. Returns its first metric, if it has one."""
    from fusechat.app import outputs
    from fusechat.models import load as models

    if not cfg.model or (not Path(cfg.model).is_dir() and cfg.model.count("/") != 1):
        raise UserError(
            f"model={cfg.model} is not a model directory or Hub id; "
            f"e.g. python -m fusechat.evaluate model={cfg.paths.experiment}/targets/NAME"
        )
    kinds = {"chats": chats, "lm_eval": lm_eval, "mt_bench": answers, "alpaca_eval": answers}
    one_of(cfg.evaluation.kind, tuple(kinds), "evaluation.kind")
    options = {key: value for key, value in plain(cfg.evaluation).items() if key != "file"}
    mark = outputs.fingerprint(model=models.model_identity(cfg.model), evaluation=options, seed=cfg.seed)
    return kinds[cfg.evaluation.kind](cfg, Path(cfg.output_file), mark)


def chats(cfg: DictConfig, output: Path, mark: str) -> float | None:
    """Bits per byte and exact match on held-out chats; returns bits per byte."""
    from fusechat.app import outputs
    from fusechat.chats.formats import load_chats
    from fusechat.report.results import metrics

    rows, _ = load_chats(cfg.evaluation.chats, split=cfg.evaluation.split, limit=cfg.evaluation.limit)
    tests = outputs.fingerprint(ids=list(rows["id"]))
    mark = outputs.fingerprint(mark=mark, tests=tests)
    if (held := finished(cfg, output, mark)) is not None:
        return held
    seed_everything(cfg.seed)
    samples = measure(cfg, rows.to_list(), output.with_suffix(f".{mark}.part"))
    found = metrics(samples, ["bits_per_byte", "nats_per_token", *(["accuracy"] if "correct" in samples[0] else [])])
    content = write(cfg, output, {"fingerprint": mark, "tests": tests, "metrics": found, "samples": samples})
    output.with_suffix(f".{mark}.part").unlink(missing_ok=True)
    log(cfg, content)
    return first_value(content)


def lm_eval(cfg: DictConfig, output: Path, mark: str) -> float | None:
    """Tasks of lm-evaluation-harness; returns the first metric over all samples."""
    from fusechat.app import outputs
    from fusechat.evaluate.harness import run_tasks
    from fusechat.report.results import metrics

    own_tasks = (
        sorted(f for f in Path(cfg.evaluation.include_path or "").rglob("*") if f.is_file())
        if cfg.evaluation.include_path
        else []
    )
    mark = outputs.fingerprint(mark=mark, own_tasks={str(f): outputs.file_hash(f) for f in own_tasks})
    if (held := finished(cfg, output, mark)) is not None:
        return held
    options = {key: value for key, value in plain(cfg.evaluation).items() if key not in ("kind", "file")}
    samples, own = run_tasks(str(cfg.model), options.pop("tasks"), seed=cfg.seed, **options)
    found = metrics(samples, sorted({name for sample in samples for name in sample} - {"id", "tag"}))
    tests = outputs.fingerprint(ids=[sample["id"] for sample in samples])
    content = write(
        cfg, output, {"fingerprint": mark, "tests": tests, "metrics": found, "harness": own, "samples": samples}
    )
    log(cfg, content)
    return first_value(content)


def answers(cfg: DictConfig, output: Path, mark: str) -> None:
    """Answers to a question file, in the form that FastChat's or alpaca_eval's judges read."""
    from fusechat.app.outputs import file_hash, fingerprint
    from fusechat.chats.render import renderer_for
    from fusechat.evaluate import answers as writing
    from fusechat.evaluate.generation import generate
    from fusechat.models import load as models

    options, path = cfg.evaluation, Path(cfg.evaluation.questions)
    questions = writing.load_questions(path, options.kind)
    mark = fingerprint(mark=mark, questions=file_hash(path))
    part, note = output.with_suffix(f".{mark}.part"), output.with_suffix(".fingerprint")
    if output.exists() and note.exists() and note.read_text() == mark and not cfg.overwrite:
        LOG.info("skip: %s answers these questions already", output)
        return
    done = whole_lines(part)
    done = done[: len(done) - len(done) % writing.PART]  # questions are asked in parts: the same parts again
    write_lines(part, [json.dumps(record) for record in done])
    tokenizer = models.load_tokenizer(cfg.model, trust_remote_code=options.trust_remote_code)
    renderer = renderer_for(tokenizer, tokenizer, options.template, options.max_length)
    model = models.load_model(
        cfg.model, dtype=options.dtype, device_map=options.device_map, trust_remote_code=options.trust_remote_code
    )

    def ask(prompts: list[Any], temperature: float) -> list[str]:
        seed_everything(cfg.seed)  # the same answers whether or not a kill came between
        limits = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
        return generate(model, renderer, prompts, temperature=temperature, **limits)

    left = questions[len(done) :]
    name = label(cfg.model)
    made = (
        writing.mt_bench(left, ask, name)
        if options.kind == "mt_bench"
        else writing.alpaca_eval(left, ask, name, options.temperature)
    )
    with part.open("a", encoding="utf-8") as file:
        for record in made:
            file.write(json.dumps(record) + "\n")
            file.flush()
    rows = whole_lines(part)
    if options.kind == "mt_bench":
        part.replace(output)
    else:
        write_json(output, rows)
        part.unlink()
    note.write_text(mark)
    LOG.info("%d questions answered by %s: %s", len(rows), cfg.model, output)


def finished(cfg: DictConfig, output: Path, mark: str) -> float | None:
    """The first metric of the result that is there and fits."""
    held = json.loads(output.read_text()) if output.exists() else {}
    if held.get("fingerprint") != mark or cfg.overwrite:
        return None
    LOG.info("skip: %s is evaluated already (fingerprint %s)", cfg.model, mark)
    return first_value(held)


def first_value(content: dict[str, Any]) -> float | None:
    """The first metric over all samples; None where the harness has only corpus metrics."""
    first = next(iter(content["metrics"].values()), None)
    return None if first is None else float(first["all"]["value"])


def write(cfg: DictConfig, output: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Writes a result file and says what is in it."""
    about = {"stage": "evaluate", "kind": cfg.evaluation.kind, "name": output.stem, "model": str(cfg.model)}
    content = {**about, **found, **provenance(cfg)}
    write_json(output, content)
    shown = ", ".join(f"{name} {entry['all']['value']:.4f}" for name, entry in found["metrics"].items())
    LOG.info("%s: %s on %d samples", cfg.model, shown, len(found["samples"]))
    return content


def measure(cfg: DictConfig, chats: list[dict[str, Any]], part: Path) -> list[dict[str, Any]]:
    """Scores and answers chat by chat; goes on after those that ``part`` holds from a killed run."""
    from fusechat.chats.render import renderer_for
    from fusechat.evaluate import generation, perplexity
    from fusechat.models import load as models

    options = cfg.evaluation
    tokenizer = models.load_tokenizer(cfg.model, trust_remote_code=options.trust_remote_code)
    renderer = renderer_for(tokenizer, tokenizer, options.template, options.max_length)
    model = models.load_model(
        cfg.model, dtype=options.dtype, device_map=options.device_map, trust_remote_code=options.trust_remote_code
    )
    models.check_vocabulary(model, tokenizer, cfg.model)
    done = whole_lines(part)
    for start in range(len(done), len(chats), PART):
        rows = chats[start : start + PART]
        found = perplexity.score(model, renderer, [row["messages"] for row in rows], options.batch_size)
        samples: list[dict[str, Any]] = [
            {"id": row["id"], "tag": row["tag"], **score} for row, score in zip(rows, found, strict=True)
        ]
        if options.generate:
            prompts = [row["messages"][:-1] for row in rows]
            answers = generation.generate(
                model, renderer, prompts, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size
            )
            for sample, row, answer in zip(samples, rows, answers, strict=True):
                reference = row["messages"][-1]["content"]
                sample |= {"prompt": row["messages"][-2]["content"], "reference": reference, "answer": answer}
                sample["correct"] = answer == reference.strip()
        with part.open("a") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in samples)
        done += samples
    return done


def log(cfg: DictConfig, content: dict[str, Any]) -> None:
    """To wandb, where it is on: summary metrics and a table of answers, the pivot's beside the model's where it was evaluated."""
    run = wandb_run(cfg, f"evaluate-{content['name']}")
    if run is None:
        return
    import wandb

    flat = {
        f"evaluation/{name}/{tag}": entry["value"]
        for name, tags in content["metrics"].items()
        for tag, entry in tags.items()
    }
    pivot = Path(cfg.output_file).with_name(f"{label(cfg.pivot.path)}.json")
    held = json.loads(pivot.read_text()) if pivot.exists() else {}
    theirs = {s["id"]: s.get("answer") for s in held["samples"]} if held.get("tests") == content["tests"] else {}
    rows = [
        [s["tag"], s["prompt"], s["reference"], theirs.get(s["id"]), s["answer"]]
        for s in content["samples"][:100]
        if "answer" in s
    ]
    columns: list[str | int] = ["skill", "prompt", "reference", "pivot's answer", "answer"]
    run.log({**flat, **({"evaluation/answers": wandb.Table(columns=columns, data=rows)} if rows else {})})
    run.summary.update(flat)
    made = Path(cfg.model)
    kind = {"targets": "target", "merged": "merged"}.get(made.parent.name)
    log_made(cfg, run, None, [(kind, made)] if kind else [])


main = entry("evaluate")(run)
if __name__ == "__main__":
    main()
