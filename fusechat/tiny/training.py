"""Training of the tiny LLMs: endless batches of answers, and a plain module."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning
import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader, IterableDataset

from fusechat.chats.padding import pad
from fusechat.chats.render import ChatRenderer


class Batches(IterableDataset[dict[str, torch.Tensor]]):
    """Endless padded batches of tokenized chats, full where there are enough; labels are -100 outside the answers."""

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], renderer: ChatRenderer, batch_size: int, seed: str, pad: int
    ) -> None:
        self.rendered = renderer([row["messages"] for row in rows])
        self.batch_size, self.seed, self.pad = batch_size, seed, pad

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rng = random.Random(self.seed)
        while True:
            order = rng.sample(self.rendered, len(self.rendered))
            for start in range(0, max(1, len(order) - self.batch_size + 1), self.batch_size):
                yield self._pad(order[start : start + self.batch_size])

    def _pad(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        ids, mask = pad([row.input_ids for row in rows], self.pad)
        labels, _ = pad([np.where(row.assistant_mask, row.input_ids, -100) for row in rows], -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Pretraining(lightning.LightningModule):
    """Plain answers-only training of a tiny model with AdamW, cosine schedule and a short warm-up."""

    def __init__(self, model: Any, lr: float, steps: int) -> None:
        super().__init__()
        self.model, self.lr, self.steps = model.train(), lr, steps

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross entropy of the answers' tokens."""
        loss: torch.Tensor = self.model(**batch, use_cache=False).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def total_steps(self) -> int:
        """As many as were asked for."""
        return self.steps

    def configure_optimizers(self) -> Any:
        """AdamW at ``lr``."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, self.steps // 20, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(data: Batches) -> DataLoader[dict[str, torch.Tensor]]:
    """A DataLoader over ready batches."""
    return DataLoader(data, batch_size=None)
