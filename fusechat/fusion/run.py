"""`train`: one target from a pivot and aligned sources, from stores on disk to a Hugging Face directory."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusechat.app import settings
from fusechat.app.errors import UserError
from fusechat.app.outputs import RECORD, fingerprint, read_json, settled
from fusechat.app.places import writes
from fusechat.app.trainer import TIMEOUT, quiet_trainer, seed_everything
from fusechat.fusion.callbacks import Callbacks, SavePretrained, is_whole, latest_checkpoint, make_callbacks, step_of
from fusechat.fusion.checks import check_checkpoint, check_maps, check_target_room, check_tokens
from fusechat.fusion.data import Data, FusionDataModule, open_stores
from fusechat.fusion.failures import Explained
from fusechat.fusion.fingerprint import earlier_fingerprint, settings_fingerprint
from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.module import FusionModule, Optimizer
from fusechat.fusion.precision import PRECISIONS, check_quantised, weights_dtype
from fusechat.fusion.ranks import group_of_one, share, starts_ranks
from fusechat.fusion.record import Description, measured
from fusechat.fusion.rules import FusionRule
from fusechat.fusion.validation import read_chats, validation_chats
from fusechat.models import load as models
from fusechat.models.whole import check_model

LOG = logging.getLogger(__name__)
METRIC = "validation/bits_per_byte"
LORA = {"enabled": False, "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
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
    validation: str | Path | None = None,
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
    lie in ``../../checkpoints`` until it is whole. trainer: options of `quiet_trainer`, over `TRAINER`; lora:
    ``enabled`` and options of `peft.LoraConfig`, over `LORA`. max_length: the longest chat in tokens where
    data.max_tokens says none. resume: ``last`` checkpoint of the same settings, a path, or None. validation: chats of
    one's own (file, folder or Hub dataset) to validate with in place of data.validation_fraction, all chats of the
    stores being trained on. logger: makes Lightning's loggers from the step that training goes on from. record: more to
    write into ``fusechat.json``. imports: the user's own modules with their hashes. remedies: for messages, the
    commands that make pivot_store and each aligned store. launch: starts so many ranks on this machine that call
    `train` with the same arguments, and returns when all have ended; None: Lightning starts the script again for each.

    Returns the validation bits per byte of the target, None where nothing was held out. Raises `UserError` for settings
    out of range, missing or unfit stores, and an output_dir that other settings have made (unless ``overwrite``).
    """
    rule, loss, optimizer = rule or FusionRule(), loss or FusionLoss(), optimizer or Optimizer()
    data, callbacks, output = data or Data(shuffle_seed=seed), callbacks or Callbacks(), Path(output_dir)
    lora, trainer = {**LORA, **(lora or {})}, {**TRAINER, **(trainer or {})}
    settings.check("lora", **lora)
    settings.check("trainer", **trainer)
    stores = open_stores(Path(pivot_store), [Path(path) for path in aligned.values()], remedies)
    check_maps(stores, loss)
    own = read_chats(validation) if validation is not None else None
    if "accumulate_grad_batches" in trainer:
        raise UserError("trainer.accumulate_grad_batches follows from data.global_batch and data.batch_size; set those")
    check_quantised(load_in, lora=lora["enabled"], strategy=trainer["strategy"])
    dtype = weights_dtype(trainer["precision"], dtype, lora=lora["enabled"], precision_loss=precision_loss)
    parts = {
        "pivot": models.model_identity(str(pivot), revision),
        "stores": [store.fingerprint for store in stores],
        "dtype": dtype,
        "fusion": asdict(rule),
        "loss": asdict(loss),
        "optimizer": asdict(optimizer),
        "data": asdict(data),
        "lora": {**lora, **({"load_in": load_in} if load_in else {})},
        "trainer": trainer,
        "seed": seed,
        **({} if own is None else {"validation": fingerprint(ids=list(own["id"]))}),
    }
    mark = settings_fingerprint(imports, parts)
    earlier = earlier_fingerprint(output / RECORD, imports, parts)
    held = settled(output / RECORD, earlier or mark, what="target", keep="run_name=NAME", overwrite=overwrite)
    checkpoints = output.parent.parent / "checkpoints" / f"{output.name}-{mark}"
    if held is not None:
        if not callbacks.keep_checkpoints:  # left by a kill after the target was whole
            shutil.rmtree(checkpoints, ignore_errors=True)
        return metric_of(held)
    planned = quiet_trainer(trainer, [])
    share(data.global_batch, data.batch_size, planned.world_size)
    if launch is not None and starts_ranks(planned):
        launch(planned.num_devices)
        return metric_of(read_json(output / RECORD))

    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = models.load_tokenizer(str(pivot), **source)
    check_tokens(stores, tokenizer, str(pivot), (*remedies, "python -m fusechat.extract source=pivot")[0])
    check_target_room(output, Path(pivot), lora)
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
        compute=PRECISIONS[trainer["precision"]][1],
        load_in=load_in,
        attn_implementation=attn_implementation,
        gradient_checkpointing=gradient_checkpointing,
        lora={key: value for key, value in lora.items() if key != "enabled"} if lora["enabled"] else None,
        **source,
    )
    checkpoint = _checkpoint(checkpoints, resume)
    loggers = logger(step_of(checkpoint)) if logger else False
    description = Description.of(mark, output.name, str(pivot), list(aligned), module, datamodule, tokenizer, record)
    saver = SavePretrained(output, description.write)
    failures = Explained()
    beside = [*make_callbacks(callbacks, checkpoints, bool(loggers)), failures]
    options = trainer | {"enable_progress_bar": callbacks.progress_bar, "use_distributed_sampler": False}
    fit = quiet_trainer(options, beside, loggers)
    fit.accumulate_grad_batches = share(data.global_batch, data.batch_size, fit.world_size).accumulate
    with group_of_one(fit.world_size), failures.around(fit, module):
        fit.fit(module, datamodule=datamodule, ckpt_path=checkpoint)
        return _finish(fit, saver, None if callbacks.keep_checkpoints else checkpoints)


def _finish(fit: Any, saver: SavePretrained, checkpoints: Path | None) -> float | None:
    """Validates the weights, where training ended in mid-epoch, then exports them; removes checkpoints; the metric.

    A target that is there has all its numbers, whenever the run was killed. Every rank comes through here: what is
    gathered is gathered from all, what is written is written by the first.
    """
    module, data = fit.lightning_module, fit.datamodule
    facts = Description.facts(module, fit)
    if len(data.validation_rows) and module.validated_at != fit.global_step:
        fit.validate(module, data, verbose=False)
        facts["metrics"] |= measured(fit)
    saver.save(module, facts)
    if fit.is_global_zero and checkpoints is not None:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return metric_of(facts)


def metric_of(held: Mapping[str, Any]) -> float | None:
    """The validation bits per byte that a target's record tells."""
    value = held.get("metrics", {}).get(METRIC)
    return None if value is None else float(value)


def _checkpoint(folder: Path, resume: str | None) -> str | None:
    """``last``: where an earlier run of the same settings stopped, if it did."""
    if resume != "last":
        if resume:
            check_checkpoint(resume)
            is_whole(Path(resume))
        return resume
    if found := latest_checkpoint(folder):
        LOG.info("resuming %s", found)
    return str(found) if found else None


def _vocab_size(path: str, revision: str | None, trust_remote_code: bool) -> int:
    from transformers import AutoConfig

    check_model(path, weights=False)
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    return int(config.get_text_config().vocab_size)
