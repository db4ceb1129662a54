"""`train`: one target from a pivot and aligned sources, from stores on disk to a Hugging Face directory.

Lightning, transformers and peft are imported where training begins: a target that is there needs none of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.app import settings
from fusechat.app.errors import UserError
from fusechat.app.outputs import RECORD, read_json, settled
from fusechat.app.places import writes
from fusechat.app.trainer import TIMEOUT
from fusechat.chats.mixture import Given
from fusechat.fusion.checks import check_maps, check_rule
from fusechat.fusion.inputs import open_stores
from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.options import Callbacks, Data, Optimizer
from fusechat.fusion.precision import check_quantised, weights_dtype
from fusechat.fusion.record import metric_of
from fusechat.fusion.rules import FusionRule
from fusechat.fusion.training import Training
from fusechat.models.gguf import check_plain

LORA = {"enabled": False, "adapter": None, "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
TRAINER = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
TRAINER |= {"max_epochs": 3, "max_steps": -1, "gradient_clip_val": 1.0, "log_every_n_steps": 20}
TRAINER |= {"enable_model_summary": False, "timeout": TIMEOUT}


@writes("train", reads=("pivot", "pivot_store", "aligned"))
def train(
    pivot: str | Path,
    pivot_store: str | Path,
    aligned: Mapping[str, str | Path],
    output_dir: str | Path,
    *,
    rule: FusionRule | None = None,
    loss: FusionLoss | None = None,
    optimizer: Optimizer | None = None,
    data: Data | None = None,
    callbacks: Callbacks | None = None,
    own_callbacks: Mapping[str, Mapping[str, Any]] | None = None,
    lora: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    load_in: str | None = None,
    precision_loss: str = "refuse",
    gradient_checkpointing: bool = False,
    max_length: int = 2048,
    seed: int = 0,
    resume: str | None = "last",
    overwrite: bool = False,
    validation: Given | None = None,
    logger: Callable[[int], Any] | None = None,
    record: Mapping[str, Any] | None = None,
    imports: Mapping[str, str] | None = None,
    remedies: Sequence[str] = (),
    launch: Callable[[int], None] | None = None,
) -> float | None:
    """Trains a target with L = λ L_SFT + (1 - λ) L_Fusion (FuseChat, arXiv 2402.16107), unless it is there already.

    pivot: directory or Hub id whose weights the target starts from; revision, trust_remote_code and attn_implementation
    say how it is loaded; dtype and load_in (``8bit``, ``4bit``) what LoRA trains its adapters over. Full fine-tuning
    keeps fp32 weights, unless trainer's precision and precision_loss say otherwise (`precision.weights_dtype`).
    pivot_store: the pivot's distributions; aligned: source name -> the store aligned to them (none for
    ``FusionRule("sft")``). output_dir: becomes the target, a Hugging Face directory with ``fusechat.json``; checkpoints
    lie in ``../../checkpoints`` until it is whole. own_callbacks: name -> ``_target_`` (a Lightning callback) and its
    arguments, part of the fingerprint: it may change the training. trainer: options of `quiet_trainer`, over `TRAINER`;
    lora: ``enabled``, ``adapter`` (the folder of one that training goes on from) and options of `peft.LoraConfig`, over
    `LORA`; the target then holds its adapter too, in ``adapter``. max_length: the longest chat in tokens where
    data.max_tokens says none. resume: ``last`` checkpoint of the same settings, a path, or None. validation: chats of
    one's own (as chat.path names them) to validate with in place of data.validation_fraction, all chats of the
    stores being trained on. logger: makes Lightning's loggers from the step that training goes on from. record: more to
    write into ``fusechat.json``. imports: the user's own modules with their hashes. remedies: for messages, the
    commands that make pivot_store and each aligned store. launch: starts so many ranks on this machine that call
    `train` with the same arguments, and returns when all have ended; None: Lightning starts the script again for each.

    Returns the validation bits per byte of the target, None where nothing was held out. Raises `UserError` for settings
    out of range, missing or unfit stores, and an output_dir that other settings have made (unless ``overwrite``).
    """
    lora, trainer = {**LORA, **(lora or {})}, {**TRAINER, **(trainer or {})}
    check_plain(pivot, "pivot.path")
    settings.check("lora", **lora)
    if lora["adapter"] and not lora["enabled"]:
        raise UserError(
            f"lora.adapter={lora['adapter']} goes on from an adapter and lora.enabled=false; set it to true"
        )
    settings.check("trainer", **trainer)
    if "accumulate_grad_batches" in trainer:
        raise UserError("trainer.accumulate_grad_batches follows from data.global_batch and data.batch_size; set those")
    check_quantised(load_in, lora=lora["enabled"], strategy=trainer["strategy"])
    loss, output = loss or FusionLoss(), Path(output_dir)
    stores = open_stores(Path(pivot_store), [Path(path) for path in aligned.values()], remedies)
    check_maps(stores, loss)
    check_rule(rule or FusionRule(), loss)
    training = Training(
        str(pivot),
        list(aligned),
        stores,
        rule=rule or FusionRule(),
        loss=loss,
        optimizer=optimizer or Optimizer(),
        data=data or Data(shuffle_seed=seed),
        lora=lora,
        trainer=trainer,
        dtype=weights_dtype(trainer["precision"], dtype, lora=lora["enabled"], precision_loss=precision_loss),
        revision=revision,
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
        load_in=load_in,
        gradient_checkpointing=gradient_checkpointing,
        max_length=max_length,
        seed=seed,
        validation=_own_chats(validation),
        imports=imports,
        own_callbacks=own_callbacks or {},
        early_stopping=callbacks.early_stopping if callbacks else None,
    )
    beside: dict[str, Any] = {"resume": resume, "logger": logger, "record": record, "remedies": remedies}
    return _made(training, output, callbacks or Callbacks(), overwrite, launch, beside)


def _made(
    training: Training,
    output: Path,
    callbacks: Callbacks,
    overwrite: bool,
    launch: Callable[[int], None] | None,
    beside: Mapping[str, Any],
) -> float | None:
    """The metric of the target: of the one that is there, of the one that ranks have made, or it is made here."""
    mark, checkpoints = training.mark_of(output / RECORD), training.checkpoints(output)
    held = settled(output / RECORD, mark, what="target", keep="run_name=NAME", overwrite=overwrite)
    if held is not None:
        if not callbacks.keep_checkpoints:  # left by a kill after the target was whole
            shutil.rmtree(checkpoints, ignore_errors=True)
        return metric_of(held)
    from fusechat.fusion.fit import fit, ranks_to_start

    ranks = ranks_to_start(training)
    if launch is not None and ranks:
        launch(ranks)
        return metric_of(read_json(output / RECORD))
    return fit(training, output, callbacks, **beside)


def _own_chats(validation: Given | None) -> Any:
    """The chats to validate with, a `datasets.Dataset`, where there are some."""
    if validation is None:
        return None
    from fusechat.fusion.validation import read_chats

    return read_chats(validation)
