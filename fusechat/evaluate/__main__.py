"""Evaluate any Hugging Face model: held-out chats, tasks of lm-evaluation-harness, answers for judges.

python -m fusechat.evaluate experiment=tiny model=DIR
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fusechat.app.command import entry, imported, label, plain, provenance
from fusechat.app.errors import UserError
from fusechat.app.outputs import read_json
from fusechat.app.tracking import ANSWERS, log, log_made, wandb_run


def run(cfg: DictConfig) -> float | None:
    """Writes ``output_file`` by the evaluation of ``evaluation.kind``. Returns its first metric, if it has one."""
    from fusechat.evaluate.places import place
    from fusechat.evaluate.stage import evaluate_by
    from fusechat.stores.served.server import server_of

    model = str(cfg.model)
    settings = {key: value for key, value in plain(cfg.evaluation).items() if key != "file"}
    if settings.get("template") == "pivot":
        settings["template"] = pivots_template(cfg)
    server = server_of(settings, model, "evaluation")
    output = place(Path(cfg.output_file), model, str(cfg.paths.experiment))
    given: dict[str, Any] = {"seed": cfg.seed, "overwrite": cfg.overwrite, "record": provenance(cfg)}
    result, made = evaluate_by(model, settings, output, server=server, imports=imported(cfg), **given)
    if "metrics" not in result:
        return None
    if made:
        follow(cfg, result, output)
    first = next(iter(result["metrics"].values()), None)
    return None if first is None else float(first["all"]["value"])


def pivots_template(cfg: DictConfig) -> str:
    """The Jinja text by which the pivot's tokenizer writes chats: a base model has none of its own."""
    from fusechat.models.load import load_tokenizer

    pivot = cfg.pivot
    tokenizer = load_tokenizer(pivot.path, revision=pivot.revision, trust_remote_code=pivot.trust_remote_code)
    if not tokenizer.chat_template:
        raise UserError(
            f"evaluation.template=pivot: the tokenizer of {pivot.path} has no chat template; give one as Jinja"
        )
    return str(tokenizer.chat_template)


def follow(cfg: DictConfig, result: Mapping[str, Any], output: Path) -> None:
    """To wandb, where it is on: summary metrics and a table of answers, the pivot's beside the model's."""
    run = wandb_run(cfg, f"evaluate-{result['name']}")
    if run is None:
        return
    flat = {
        f"evaluation/{name}/{tag}": entry["value"]
        for name, tags in result["metrics"].items()
        for tag, entry in tags.items()
    }
    rows = answered(result, output.with_name(f"{label(cfg.pivot.path)}.json"))
    columns = ["skill", "prompt", "reference", "pivot's answer", "answer"]
    log(run, flat, tables={ANSWERS: (columns, rows)} if rows else {})
    run.summary.update(flat)
    made = Path(cfg.model)
    kind = {"targets": "target", "merged": "merged"}.get(made.parent.name)
    log_made(cfg, run, None, [(kind, made)] if kind else [])


def answered(result: Mapping[str, Any], pivot: Path) -> list[list[Any]]:
    """Skill, prompt, reference, the pivot's answer where its result is of the same tests, and the model's answer."""
    held = read_json(pivot) if pivot.exists() else {}
    same = held.get("tests") == result["tests"]
    theirs = {sample["id"]: sample.get("answer") for sample in held["samples"]} if same else {}
    shown = [sample for sample in result["samples"][:100] if "answer" in sample]
    return [[s["tag"], s["prompt"], s["reference"], theirs.get(s["id"]), s["answer"]] for s in shown]


main = entry("evaluate")(run)
if __name__ == "__main__":
    main()
