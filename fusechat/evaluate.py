"""Evaluate any Hugging Face model on held-out chats.

python -m fusechat.evaluate experiment=tiny model=DIR
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fusechat.errors import UserError
from fusechat.runtime import entry, label, plain, provenance, seed_everything, whole_lines, write_text_json
from fusechat.tracking import log_made, wandb_run

LOG = logging.getLogger(__name__)
PART = 256  # samples between two writes: what a killed evaluation has to do again at most


def run(cfg: DictConfig) -> float | None:
    """Writes ``output_file``: metrics with intervals per skill, and every sample. Returns bits per byte."""
    from fusechat import models, store
    from fusechat.chat_data import load_chats

    if not cfg.model or (not Path(cfg.model).is_dir() and cfg.model.count("/") != 1):
        raise UserError(
            f"model={cfg.model} is not a model directory or Hub id; "
            f"e.g. python -m fusechat.evaluate model={cfg.paths.experiment}/targets/NAME"
        )
    chats, _ = load_chats(cfg.evaluation.chats, split=cfg.evaluation.split, limit=cfg.evaluation.limit)
    tests = store.fingerprint(ids=list(chats["id"]))
    mark = store.fingerprint(
        model=models.model_identity(cfg.model), tests=tests, evaluation=plain(cfg.evaluation), template=cfg.evaluation.template
    )
    output = Path(cfg.output_file)
    held = json.loads(output.read_text()) if output.exists() else {}
    if held.get("fingerprint") == mark and not cfg.overwrite:
        LOG.info("skip: %s is evaluated already (fingerprint %s)", cfg.model, mark)
        return float(held["metrics"]["bits_per_byte"]["all"]["value"])
    seed_everything(cfg.seed)
    samples = measure(cfg, chats.to_list(), output.with_suffix(f".{mark}.part"))
    content = {
        "fingerprint": mark, "stage": "evaluate", "name": output.stem, "model": str(cfg.model), "tests": tests,
        "metrics": metrics(samples), "samples": samples, **provenance(cfg),
    }  # fmt: skip
    write_text_json(output, content)
    output.with_suffix(f".{mark}.part").unlink(missing_ok=True)
    value = content["metrics"]["bits_per_byte"]["all"]["value"]
    shown = ", ".join(f"{name} {entry['all']['value']:.4f}" for name, entry in content["metrics"].items())
    LOG.info("%s: %s on %d chats", cfg.model, shown, len(samples))
    log(cfg, content)
    return float(value)


def measure(cfg: DictConfig, chats: list[dict[str, Any]], part: Path) -> list[dict[str, Any]]:
    """Scores and answers chat by chat; goes on after those that ``part`` holds from a killed run."""
    from fusechat import models
    from fusechat.chat import renderer_for
    from fusechat.evaluation import generation, perplexity

    options = cfg.evaluation
    tokenizer = models.load_tokenizer(cfg.model, trust_remote_code=options.trust_remote_code)
    renderer = renderer_for(tokenizer, tokenizer, options.template, options.max_length)
    model = models.load_model(cfg.model, dtype=options.dtype, device_map=options.device_map, trust_remote_code=options.trust_remote_code)
    models.check_vocabulary(model, tokenizer, cfg.model)
    done = whole_lines(part)
    for start in range(len(done), len(chats), PART):
        rows = chats[start : start + PART]
        found = perplexity.score(model, renderer, [row["messages"] for row in rows], options.batch_size)
        samples: list[dict[str, Any]] = [{"id": row["id"], "tag": row["tag"], **score} for row, score in zip(rows, found, strict=True)]
        if options.generate:
            prompts = [row["messages"][:-1] for row in rows]
            answers = generation.generate(model, renderer, prompts, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size)
            for sample, row, answer in zip(samples, rows, answers, strict=True):
                reference = row["messages"][-1]["content"]
                sample |= {"prompt": row["messages"][-2]["content"], "reference": reference, "answer": answer}
                sample["correct"] = answer == reference.strip()
        with part.open("a") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in samples)
        done += samples
    return done


def metrics(samples: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """metric -> skill (``all`` first) -> value with interval."""
    from fusechat.evaluation.statistics import interval

    names = ["bits_per_byte", "nats_per_token", *(["accuracy"] if "correct" in samples[0] else [])]
    groups = {"all": samples} | {tag: [s for s in samples if s["tag"] == tag] for tag in sorted({s["tag"] for s in samples if s["tag"]})}
    return {name: {tag: interval(part, name) for tag, part in groups.items()} for name in names}


def log(cfg: DictConfig, content: dict[str, Any]) -> None:
    """To wandb, where it is on: summary metrics and a table of answers, the pivot's beside the model's where it was evaluated."""
    run = wandb_run(cfg, f"evaluate-{content['name']}")
    if run is None:
        return
    import wandb

    flat = {f"evaluation/{name}/{tag}": entry["value"] for name, tags in content["metrics"].items() for tag, entry in tags.items()}
    pivot = Path(cfg.output_file).with_name(f"{label(cfg.pivot.path)}.json")
    held = json.loads(pivot.read_text()) if pivot.exists() else {}
    theirs = {s["id"]: s.get("answer") for s in held["samples"]} if held.get("tests") == content["tests"] else {}
    rows = [[s["tag"], s["prompt"], s["reference"], theirs.get(s["id"]), s["answer"]] for s in content["samples"][:100] if "answer" in s]
    columns: list[str | int] = ["skill", "prompt", "reference", "pivot's answer", "answer"]
    run.log({**flat, "evaluation/answers": wandb.Table(columns=columns, data=rows)})
    run.summary.update(flat)
    made = Path(cfg.model)
    kind = {"targets": "target", "merged": "merged"}.get(made.parent.name)
    log_made(cfg, run, None, [(kind, made)] if kind else [])


main = entry("evaluate")(run)
if __name__ == "__main__":
    main()
