"""`train`: one target from a pivot and aligned sources, from stores on disk to a Hugging Face directory."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusechat.app.outputs import RECORD, fingerprint, settled, stage_fingerprint
from fusechat.app.places import writes
from fusechat.app.trainer import quiet_trainer, seed_everything
from fusechat.fusion.callbacks import Callbacks, SavePretrained, is_whole, latest_checkpoint, make_callbacks, step_of
from fusechat.fusion.data import Data, FusionDataModule, open_stores
from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.module import FusionModule, Optimizer
from fusechat.fusion.record import Description
from fusechat.fusion.rules import FusionRule
from fusechat.fusion.validation import read_chats, validation_chats
from fusechat.models import load as models
from fusechat.models.whole import check_model

LOG = logging.getLogger(__name__)
METRIC = "validation/bits_per_byte"
LORA = {"enabled": False, "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
TRAINER = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
TRAINER |= {"max_epochs": 3, "max_steps": -1, "accumulate_grad_batches": 1, "gradient_clip_val": 1.0}
TRAINER |= {"log_every_n_steps": 20, "enable_model_summary": False}
UNDECIDING = {"devices", "num_nodes", "accelerator", "log_every_n_steps", "enable_model_summary"}  # of the result


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
    lora: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    max_length: int = 2048,
    seed: int = 0,
    resume: str | None = "last",
    overwrite: bool = False,
    validation: str | Path | None = None,
    logger: Callable[[int], Any] | None = None,
    record: Mapping[str, Any] | None = None,
    imports: Mapping[str, str] | None = None,
    remedies: Sequence[str] = (),
) -> float | None:
    """Trains a target with L = λ L_SFT + (1 - λ) L_Fusion (FuseChat, arXiv 2402.16107), unless it is there already.

    pivot: directory or Hub id whose weights the target starts from; dtype, revision, trust_remote_code and
    attn_implementation say how it is loaded. pivot_store: the pivot's distributions; aligned: source name -> the
    store aligned to them (none for ``FusionRule("sft")``). output_dir: becomes the target, a Hugging Face directory
    with ``fusechat.json``; checkpoints lie in ``../../checkpoints`` until it is whole. trainer: options of
    `lightning.Trainer`, over `TRAINER`; lora: ``enabled`` and options of `peft.LoraConfig`, over `LORA`.
    max_length: the longest chat in tokens where data.max_tokens says none. resume: ``last`` checkpoint of the same
    settings, a path, or None. validation: chats of one's own (file, folder or Hub dataset) to validate with in
    place of data.validation_fraction, all chats of the stores being trained on. logger: makes Lightning's loggers
    from the step that training goes on from. record: more to write into ``fusechat.json``. imports: the user's own
    modules with their hashes. remedies: for messages, the commands that make pivot_store and each aligned store.

    Returns the validation bits per byte of the target, None where nothing was held out. Raises `UserError` for settings
    out of range, missing or unfit stores, and an output_dir that other settings have made (unless ``overwrite``).
    """
    rule, loss, optimizer = rule or FusionRule(), loss or FusionLoss(), optimizer or Optimizer()
    data, callbacks, output = data or Data(shuffle_seed=seed), callbacks or Callbacks(), Path(output_dir)
    lora, trainer = {**LORA, **(lora or {})}, {**TRAINER, **(trainer or {})}
    stores = open_stores(Path(pivot_store), [Path(path) for path in aligned.values()], remedies)
    own = read_chats(validation) if validation is not None else None
    mark = stage_fingerprint(
        imports,
        pivot=models.model_identity(str(pivot), revision),
        stores=[store.fingerprint for store in stores],
        dtype=dtype,
        fusion=asdict(rule),
        loss=asdict(loss),
        optimizer=asdict(optimizer),
        data=asdict(data),
        lora=lora,
        trainer={key: value for key, value in trainer.items() if key not in UNDECIDING},
        seed=seed,
        gradient_checkpointing=gradient_checkpointing,
        **({} if own is None else {"validation": fingerprint(ids=list(own["id"]))}),
    )
    held = settled(output / RECORD, mark, what="target", keep="run_name=NAME", overwrite=overwrite)
    checkpoints = output.parent.parent / "checkpoints" / f"{output.name}-{mark}"
    if held is not None:
        if not callbacks.keep_checkpoints:  # left by a kill after the target was whole
            shutil.rmtree(checkpoints, ignore_errors=True)
        value = held.get("metrics", {}).get(METRIC)
        return None if value is None else float(value)

    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = models.load_tokenizer(str(pivot), **source)
    seed_everything(seed)
    datamodule = FusionDataModule(
        stores,
        data,
        max_tokens=data.max_tokens or max_length,
        vocab_size=_vocab_size(str(pivot), **source),
        pad_token_id=tokenizer.pad_token_id or 0,
        own=None if own is None else validation_chats(own, tokenizer, stores[0].manifest),
    )
    module = FusionModule(
        str(pivot),
        list(aligned),
        rule=rule,
        loss=loss,
        optimizer=optimizer,
        dtype=dtype,
        attn_implementation=attn_implementation,
        gradient_checkpointing=gradient_checkpointing,
        lora={key: value for key, value in lora.items() if key != "enabled"} if lora["enabled"] else None,
        **source,
    )
    checkpoint = _checkpoint(checkpoints, resume)
    loggers = logger(step_of(checkpoint)) if logger else False
    description = Description.of(mark, output.name, str(pivot), list(aligned), module, datamodule, tokenizer, record)
    saver = SavePretrained(output, description.write)
    beside = make_callbacks(callbacks, checkpoints, bool(loggers))
    options = {**trainer, "enable_progress_bar": callbacks.progress_bar, "use_distributed_sampler": False}
    fit = quiet_trainer(options, beside, loggers)
    fit.fit(module, datamodule=datamodule, ckpt_path=checkpoint)
    return _finish(fit, saver, None if callbacks.keep_checkpoints else checkpoints)


def _finish(fit: Any, saver: SavePretrained, checkpoints: Path | None) -> float | None:
    """Validates the weights, where training ended in mid-epoch, then exports them; removes checkpoints; the metric.

    A target that is there has all its numbers, whenever the run was killed.
    """
    module, data, trained = fit.lightning_module, fit.datamodule, dict(fit.callback_metrics)
    if len(data.validation_rows) and module.validated_at != fit.global_step:
        fit.validate(module, data, verbose=False)
    saver.save(fit, module, {name: float(value) for name, value in {**trained, **fit.callback_metrics}.items()})
    if fit.is_global_zero and checkpoints is not None:
        shutil.rmtree(checkpoints, ignore_errors=True)
    value = fit.callback_metrics.get(METRIC)
    return None if value is None else float(value)


def _checkpoint(folder: Path, resume: str | None) -> str | None:
    """``last``: where an earlier run of the same settings stopped, if it did."""
    if resume is not None and resume != "last" and Path(resume).exists():
        is_whole(Path(resume))
    if resume != "last":
        return resume
    if found := latest_checkpoint(folder):
        LOG.info("resuming %s", found)
    return str(found) if found else None


def _vocab_size(path: str, revision: str | None, trust_remote_code: bool) -> int:
    from transformers import AutoConfig

    check_model(path, weights=False)
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    return int(config.get_text_config().vocab_size)
