"""Answers of the model under training to a few held-out prompts, after every validation: in the log, and as a table."""

from __future__ import annotations

import logging
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng

LOG = logging.getLogger(__name__)
LONGEST = 64  # new tokens of an answer
SHOWN = 120  # characters of a text in the log
COLUMNS = ["step", "prompt", "reference", "answer"]


class Samples(Callback):
    """Greedy answers to the first question of ``count`` held-out chats; the training takes the same way without it."""

    def __init__(self, count: int, tokenizer: Any) -> None:
        self.count, self.tokenizer = count, tokenizer
        self.rows: list[list[Any]] = []

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Weights and modules are as validation has them: nothing is trained, dropout is off."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        store = data.stores[0] if data.own is None else data.own
        rows = data.validation_rows[: self.count].tolist()
        with isolate_rng(), torch.inference_mode():
            now: list[list[Any]] = [[trainer.global_step, *self._answered(pl_module, store, row)] for row in rows]
        self.rows += now
        for step, *texts in now:
            shown = [" ".join(text.split())[:SHOWN] for text in texts]
            LOG.info("step %d: %r is answered %r (reference: %r)", step, shown[0], shown[2], shown[1])
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):  # wandb's
                logger.log_table("train/samples", columns=COLUMNS, data=self.rows)

    def _answered(self, pl_module: Any, store: Any, row: int) -> list[str]:
        """Prompt, reference and answer."""
        ids, positions = store.row(row, "input_ids", "positions")
        first, gold = int(positions[0]) + 1, store.gold(row)
        prompt = torch.as_tensor(ids[:first].astype("int64"), device=pl_module.device)[None]
        own = pl_module.model.generation_config.eos_token_id
        stops = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id, int(gold[-1])} - {None}
        filler = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(stops)
        made = pl_module.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=LONGEST,
            do_sample=False,
            eos_token_id=sorted(stops),
            pad_token_id=filler,
        )
        tokens = (ids[:first], gold, made[0, first:].tolist())
        return [self.tokenizer.decode(part, skip_special_tokens=True).strip() for part in tokens]
