"""The training itself: Lightning's module, data and trainer from a `Training`, run, and what comes of them written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.app.parts import made
from fusechat.app.trainer import quiet_trainer, seed_everything
from fusechat.chats.padding import layout_of
from fusechat.fusion.callbacks import SavePretrained, make_callbacks
from fusechat.fusion.checkpoints import step_of, to_resume
from fusechat.fusion.checks import check_sharded, check_target_room, check_tokens
from fusechat.fusion.data import FusionDataModule
from fusechat.fusion.failures import Explained
from fusechat.fusion.module import FusionModule
from fusechat.fusion.options import Callbacks
from fusechat.fusion.precision import PRECISIONS
from fusechat.fusion.ranks import Share, group_of_one, share, starts_ranks
from fusechat.fusion.record import Description, measured, metric_of
from fusechat.fusion.training import Training
from fusechat.fusion.validation import validation_chats, warn_of_trained
from fusechat.models import load as models


def ranks_to_start(training: Training) -> int:
    """How many processes are to share the work where this one would have to start them; 0 where it has not to.

    Raises `UserError` where a step's chats cannot be shared among them.
    """
    planned = quiet_trainer(training.trainer, [])
    _share(training, planned)
    return int(planned.num_devices) if starts_ranks(planned) else 0


def fit(
    training: Training,
    output: Path,
    callbacks: Callbacks,
    *,
    resume: str | None,
    logger: Callable[[int], Any] | None,
    record: Mapping[str, Any] | None,
    remedies: Sequence[str],
) -> float | None:
    """Trains and writes the target; the arguments are those of `fusechat.fusion.train`. Returns its metric."""
    tokenizer = models.load_tokenizer(training.pivot, **_source(training))
    commands = (*remedies, "python -m fusechat.extract source=pivot")
    check_tokens(training.stores, tokenizer, training.pivot, commands[0])
    check_target_room(output, Path(training.pivot), training.lora)
    data, module = _data(training, tokenizer), _module(training)
    checkpoints = training.checkpoints(output)
    checkpoint = to_resume(checkpoints, resume)
    check_sharded(checkpoint, training.trainer["strategy"])
    loggers = logger(step_of(checkpoint)) if logger else False
    saver = SavePretrained(output, Description.of(training, output.name, module, data, tokenizer, record).write)
    failures = Explained()
    own = made("callbacks", training.own_callbacks)
    beside = [*make_callbacks(callbacks, checkpoints, bool(loggers), tokenizer), *own, failures]
    options = {"enable_progress_bar": False, "use_distributed_sampler": False}
    trainer = quiet_trainer({**training.trainer, **options}, beside, loggers)
    trainer.accumulate_grad_batches = _share(training, trainer).accumulate
    with group_of_one(trainer.world_size), failures.around(trainer, module):
        seed_everything(training.seed)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        return _finish(trainer, saver, None if callbacks.keep_checkpoints else checkpoints)


def _share(training: Training, trainer: Any) -> Share:
    return share(training.data.global_batch, training.data.batch_size, trainer.world_size)


def _source(training: Training) -> dict[str, Any]:
    """Which files the pivot is read from."""
    return {"revision": training.revision, "trust_remote_code": training.trust_remote_code}


def _data(training: Training, tokenizer: Any) -> FusionDataModule:
    own, stores = training.validation, training.stores
    if own is not None:
        warn_of_trained(own, stores[0])
    return FusionDataModule(
        stores,
        training.data,
        max_tokens=training.data.max_tokens or training.max_length,
        vocab_size=int(models.load_config(training.pivot, **_source(training)).get_text_config().vocab_size),
        pad_token_id=tokenizer.pad_token_id or 0,
        own=None if own is None else validation_chats(own, tokenizer, stores[0].manifest),
        chunked=training.loss.on_chunks,
        split=training.loss.split,
        lay=layout_of(training.data.packing, training.attn_implementation),
    )


def _module(training: Training) -> FusionModule:
    lora = {key: value for key, value in training.lora.items() if key != "enabled"}
    return FusionModule(
        training.pivot,
        training.sources,
        rule=training.rule,
        loss=training.loss,
        optimizer=training.optimizer,
        dtype=training.dtype,
        compute=PRECISIONS[training.trainer["precision"]][1],
        load_in=training.load_in,
        attn_implementation=training.attn_implementation,
        gradient_checkpointing=training.gradient_checkpointing,
        lora=lora if training.lora["enabled"] else None,
        **_source(training),
    )


def _finish(trainer: Any, saver: SavePretrained, checkpoints: Path | None) -> float | None:
    """Validates the weights, where training ended in mid-epoch, then exports them; removes checkpoints; the metric.

    A target that is there has all its numbers, whenever the run was killed. Every rank comes through here: what is
    gathered is gathered from all, what is written is written by the first.
    """
    module, data = trainer.lightning_module, trainer.datamodule
    facts = Description.facts(module, trainer)
    if len(data.validation_rows) and module.validated_at != trainer.global_step:
        trainer.validate(module, data, verbose=False)
        facts["metrics"] |= measured(trainer)
    saver.save(module, facts)
    if trainer.is_global_zero and checkpoints is not None:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return metric_of(facts)
