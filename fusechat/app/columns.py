"""What runs are compared by: of a job's config the keys that decide it, its tags, and its name with the seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusechat.app.hints import task_overrides
from fusechat.app.naming import decides, label
from fusechat.app.parts import TARGET

SHARED = ("experiment_name", "seed", "pivot.path")
RENDERING = ("chat.path", "chat.template", "chat.max_length")
FUSION = ("rule", "level", "metric", "include_pivot")
LOSS = ("kind", "lm_weight", "schedule", "temperature", "missing_mass")
OPTIMIZER = (TARGET, "lr", "weight_decay", "warmup_ratio", "schedule")
EVALUATION = (
    "kind",
    "chats",
    "questions",
    "tasks",
    "split",
    "limit",
    "template",
    "generate",
    "max_new_tokens",
    "dtype",
)
COLUMNS = {  # stage -> keys, and sections all of whose keys count
    "extract": (
        "source.name",
        "source.path",
        "source.dtype",
        "source.load_in",
        *RENDERING,
        "extract",
        "store.logprobs",
    ),
    "align": ("source.name", "token_map.name", "alignment", "store.logprobs"),
    "train": (
        *("run_name", "source.name", "sources", "data.global_batch", "data.shuffle_seed", "lora.enabled"),
        *(f"fusion.{key}" for key in FUSION),
        *(f"loss.{key}" for key in LOSS),
        *(f"optimizer.{key}" for key in OPTIMIZER),
        *("trainer.max_epochs", "trainer.max_steps"),
    ),
    "merge": ("merge", "targets", "target"),
    "evaluate": ("model", *(f"evaluation.{key}" for key in EVALUATION)),
    "report": ("report", "runs"),
}
SWEPT = ("loss.lm_weight", "fusion.rule")  # what a view of wandb sets against the objective
BY = "source.name"  # what it groups trainings by
LONG = 64  # characters that wandb lets a tag have


def columns(values: Mapping[str, Any]) -> dict[str, Any]:
    """About twenty keys with their values, under the same names in every stage; and what the command line gave besides.

    values: a flat config, dotted key -> value.
    """
    stage = str(values["stage"])
    given = {override.lstrip("+").partition("=")[0] for override in task_overrides()}
    known = {*SHARED, *COLUMNS.get(stage, ())}
    found = {key: value for key, value in values.items() if {key, key.partition(".")[0]} & known or key in given}
    return {"stage": stage, **{key: value for key, value in found.items() if decides(key) or key in known}}


def tags(values: Mapping[str, Any]) -> list[str]:
    """Experiment, stage, and what is looked for by name: sources and rule, method, or model."""
    stage, sources = str(values["stage"]), values.get("sources") or []
    own = {
        "extract": [values.get("source.name")],
        "align": [values.get("source.name"), values.get("token_map.name")],
        "train": [values.get("fusion.rule"), *(sources if values.get("fusion.rule") != "sft" else [])],
        "merge": [values.get("merge.method")],
        "evaluate": [label(str(values.get("model"))), values.get("evaluation.kind")],
    }.get(stage, [])
    found = [values["experiment_name"], stage, *own, *(values.get("logger.tags") or [])]
    return list(dict.fromkeys(str(tag)[:LONG] for tag in found if tag is not None))


def seeded(name: Any, values: Mapping[str, Any]) -> str:
    """A run's or a group's name with the seed."""
    return f"{name}-seed{values['seed']}"
