"""What each command must be given, what excludes each other, and the optional packages that settings ask for."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.hints import task_overrides
from fusechat.app.verbs import command_line

Values = Mapping[str, Any]  # dotted key -> value; keys without a value are absent
NEEDS = {  # verb -> keys without which it cannot begin
    "tiny": ("tiny.models",),
    "extract": ("source.name", "source.path", "chat.path"),
    "preview": ("pivot.path", "chat.path"),
    "align": ("source.name",),
    "train": ("pivot.path",),
    "merge": ("pivot.path",),
    "merge_search": ("pivot.path", "targets", "chat.path"),
    "mutual": ("pivot.path", "chat.path", "mutual.clients"),
    "evaluate": ("model",),
    "compare": ("first", "second"),
    "judge": ("answers", "judge.base_url", "judge.model"),
    "publish": ("model", "repo"),
    "pipeline": ("pipeline.steps",),
}
SERVED = {"extract": "source", "evaluate": "evaluation"}  # verb -> section with the keys of a server
QUESTIONS = {"chats": "evaluation.chats", "mt_bench": "evaluation.questions", "alpaca_eval": "evaluation.questions"}
EXAMPLES = {"source.name": "NAME", "chat.path": "FILE", "evaluation.chats": "FILE", "evaluation.questions": "FILE"}
EXAMPLES |= {"answers": "FILE", "judge.base_url": "http://HOST/v1", "judge.model": "NAME", "repo": "owner/name"}
EXAMPLES |= dict.fromkeys(("source.base_url", "evaluation.base_url"), "http://HOST:8000/v1")
EXAMPLES |= {"first": "A.json", "second": "B.json"}
GROUPS = {"tiny.models": "experiment=tiny", "pipeline.steps": "experiment=NAME"}  # keys that an experiment brings
GROUPS |= {"mutual.clients": "'mutual.clients={NAME: {path: DIR, chats: FILE}}'"}
GROUPS |= {"targets": "targets='[DIR,DIR]'"}
PACKAGES = {  # key -> verbs that heed it, module, how it is installed
    "lora.enabled": (("train",), "peft", "'fusechat[lora]'"),
    "mutual.method": (("mutual",), "peft", "'fusechat[lora]'"),
    "source.device_map": (("extract",), "accelerate", "'fusechat[large]'"),
    "source.load_in": (("extract",), "bitsandbytes", "bitsandbytes"),
    "pivot.load_in": (("train",), "bitsandbytes", "bitsandbytes"),
    "evaluation.device_map": (("evaluate",), "accelerate", "'fusechat[large]'"),
    "report.workspace": (("report",), "wandb_workspaces", "'fusechat[workspace]'"),
    "search.device_map": (("merge_search",), "accelerate", "'fusechat[large]'"),
}
HALF = {  # verb -> key of its model's attention, of what it computes in, and what that may be with flash attention
    "train": ("pivot.attn_implementation", "trainer.precision", "bf16-mixed"),
    "extract": ("source.attn_implementation", "source.dtype", "bfloat16"),
}
EXACT = ("32-true", "64-true", "32", 32, "float32", "float64")
TARGETS = {  # what a _target_ begins with -> its package, how it is installed
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "lightning.pytorch.loggers.MLFlowLogger": ("mlflow", "'fusechat[mlflow]'"),
    "lightning.pytorch.loggers.TensorBoardLogger": ("tensorboard", "'fusechat[tensorboard]'"),
}


def check(verb: str, values: Values) -> None:
    """Raises `UserError` for what is missing (all at once), for what excludes each other, and for absent packages."""
    if missing := [key for key in needed(verb, values) if values.get(key) in (None, {}, [])]:
        give = " ".join(GROUPS.get(key) or f"{key}={EXAMPLES.get(key, 'DIR')}" for key in missing)
        are = "is" if len(missing) == 1 else "are"
        raise UserError(f"{', '.join(missing)} {are} missing; run: {command_line(verb)} {give}")
    for fault in [*excluding(verb, values), *lacking(verb, values)]:
        raise UserError(fault)


def needed(verb: str, values: Values) -> list[str]:
    """The keys that a command needs with these settings."""
    if verb == "merge" and values.get("merge.recipe"):
        return []
    keys = [*NEEDS.get(verb, ())]
    if asked_of(verb, values):
        keys.append(f"{SERVED[verb]}.base_url")
        if verb == "extract" and values.get("source.model"):
            keys.remove("source.path")  # the name is the tokenizer's Hub id too
    if verb == "extract" and values.get("chat.template") == "pivot":
        keys.append("pivot.path")
    if verb == "train" and values.get("sources") == [None] and values.get("fusion.rule") != "sft":
        keys.append("source.name")
    if verb == "merge":
        keys.append("target" if values.get("merge.method") == "compress" else "targets")
    if verb == "evaluate" and (asked := QUESTIONS.get(str(values.get("evaluation.kind")))):
        keys.append(asked)
    return keys


def asked_of(verb: str, values: Values) -> bool:
    """Whether a command asks a server for what its model says."""
    return verb in SERVED and values.get(f"{SERVED[verb]}.engine") not in (None, "transformers")


def excluding(verb: str, values: Values) -> Iterator[str]:
    """Settings that cannot go together."""
    if verb == "train" and values.get("trainer.max_epochs") == -1 and values.get("trainer.max_steps") == -1:
        yield "trainer.max_epochs=-1 and trainer.max_steps=-1 together never end; give one of them"
    if verb == "train" and values.get("callbacks.early_stopping") and not held_out(values):
        yield (
            f"callbacks.early_stopping={values['callbacks.early_stopping']} looks at held-out chats and "
            "data.validation_fraction=0 holds out none; give e.g. data.validation_fraction=0.05"
        )
    if verb == "train" and values.get("callbacks.samples"):
        if not held_out(values):
            yield "callbacks.samples asks held-out prompts and data.validation_fraction=0 holds none; give e.g. 0.05"
        if values.get("trainer.strategy") == "fsdp":
            yield "callbacks.samples cannot answer with a model in shards (trainer=fsdp); set callbacks.samples=0"
    if verb == "report" and values.get("report.workspace") and not is_online(values):
        yield "report.workspace=true saves views in wandb's project; add logger=wandb, after 'wandb login'"
    if verb in HALF and is_flash(values, verb) and values.get((asked := HALF[verb])[1]) in EXACT:
        yield f"{asked[0]}={values[asked[0]]} computes in half precision; set {asked[1]}={asked[2]}"
    if verb == "merge" and values.get("target") and values.get("merge.method") != "compress":
        yield f"target={values['target']} is for merge=compress; a merge takes targets='[DIR,DIR]'"
    if verb == "merge" and values.get("merge.recipe"):
        own = ("targets=", "target=", "pivot.path=", "merge=", "merge.weights=", "merge.patterns=", "merge.dtype=")
        if given := [override for override in task_overrides() if override.startswith(own)]:
            yield f"{given[0]} and merge.recipe={values['merge.recipe']}: a recipe says that itself; leave one out"


def is_online(values: Values) -> bool:
    """Whether a command logs to wandb over the network."""
    return values.get("logger.kind") == "wandb" and not values.get("logger.offline")


def is_flash(values: Values, verb: str) -> bool:
    """Whether a command's model runs with flash attention."""
    return verb in HALF and "flash" in str(values.get(HALF[verb][0]))


def on_a_card(verb: str, values: Values) -> list[str]:
    """The keys whose values need a CUDA device."""
    keys = [HALF[verb][0]] if is_flash(values, verb) else []
    own = "optimizer._target_"
    return keys + [own] * (verb == "train" and str(values.get(own)).startswith("bitsandbytes"))


def held_out(values: Values) -> bool:
    """Whether a training has chats to validate with."""
    return bool(values.get("data.validation_fraction") or values.get("validation.path"))


def lacking(verb: str, values: Values) -> Iterator[str]:
    """Settings whose package is not installed."""
    asked = [(key, module, extra) for key, (verbs, module, extra) in PACKAGES.items() if verb in verbs]
    if values.get("evaluation.kind") == "lm_eval" and verb == "evaluate":
        asked.append(("evaluation.kind", "lm_eval", "'fusechat[eval]'"))
    for section in ("pivot", "source"):
        if values.get(f"{section}.attn_implementation") == "flash_attention_2" and verb in ("extract", "train"):
            asked.append((f"{section}.attn_implementation", "flash_attn", "flash-attn"))
    for key in [key for key in values if key.endswith("._target_")] if verb == "train" else []:
        asked += [(key, *TARGETS[start]) for start in TARGETS if str(values[key]).startswith(start)]
    for key, module, extra in asked:
        if values.get(key) and importlib.util.find_spec(module) is None:
            yield f"{key}={values[key]} needs {module}: pip install {extra}"
