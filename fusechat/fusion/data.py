"""FusionDataModule: chats to train on and to validate with, in batches that Lightning resumes in mid-epoch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from fusechat.app.errors import UserError
from fusechat.chats.formats import in_validation
from fusechat.chats.padding import Layout, padded
from fusechat.fusion.batches import FusionBatch, FusionRows
from fusechat.fusion.options import Data
from fusechat.fusion.plan import Ints, Plan
from fusechat.fusion.ranks import share
from fusechat.stores.store import DistributionStore

LOG = logging.getLogger(__name__)


class PlannedLoader(DataLoader[FusionBatch]):
    """A DataLoader of a plan's batches that draws nothing from the global random generator.

    Lightning saves and resumes it in mid-epoch: the state is how many optimizer steps are done.
    """

    def __init__(self, data: FusionRows, plan: Plan, module: FusionDataModule, workers: int = 0) -> None:
        options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
        super().__init__(data, sampler=plan, batch_size=None, generator=torch.Generator(), **options)
        self.plan, self.module = plan, module

    def state_dict(self) -> dict[str, int]:
        """Optimizer steps of this epoch that training has taken (not batches fetched ahead)."""
        assert self.module.trainer is not None
        micro_batches = int(self.module.trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        return {"steps": self.plan.steps_done(micro_batches), "epoch": self.module.trainer.current_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on after the steps that were done; a finished epoch is followed by a new one."""
        unfinished = state["steps"] < self.plan.optimizer_steps
        self.plan.epoch, self.plan.start = (state["epoch"], state["steps"]) if unfinished else (state["epoch"] + 1, 0)


class FusionDataModule(lightning.LightningDataModule):
    """Splits the chats of opened stores by content hash, and batches them.

    max_tokens: the longest chat that is allowed; vocab_size: rows of the pivot's embedding; own: chats to validate with
    in place of a part of the stores'; chunked, split and lay: see `FusionRows`. Raises `UserError` where a chat is
    longer, a store has more ids, or no chat is left to train on.
    """

    def __init__(
        self,
        stores: Sequence[DistributionStore],
        data: Data,
        *,
        max_tokens: int,
        vocab_size: int,
        pad_token_id: int,
        own: DistributionStore | None = None,
        chunked: bool = False,
        split: bool = False,
        lay: Layout = padded,
    ) -> None:
        super().__init__()
        self.stores, self.settings, pivot = list(stores), data, stores[0]
        if (ids := pivot.manifest["vocab_size"]) > vocab_size:
            known = f"the model's embedding {vocab_size} rows"
            raise UserError(f"{pivot.path} has ids up to {ids}, {known}; set pivot.path")
        self.rows = FusionRows(stores, pad_token_id, chunked, lay, split)
        self.responses = self.rows.scalars["tokens"][:, 0].numpy().astype(np.int64)
        self.lengths = pivot.lengths("input_ids")
        if (longest := int(self.lengths.max())) > max_tokens:
            limit = f"{max_tokens}, the model's context or data.max_tokens"
            raise UserError(f"a chat of {longest} tokens exceeds {limit}; extract with chat.max_length")
        fraction, seed = data.validation_fraction if own is None else 0.0, data.split_seed
        ids = (identity for rows in pivot.ranges for identity in pivot.arrow("id", *rows).to_pylist())
        held_out = np.fromiter((in_validation(identity, fraction, seed) for identity in ids), bool, len(pivot))
        usable = self.responses > 0
        self.train_rows, self.validation_rows = np.flatnonzero(usable & ~held_out), np.flatnonzero(usable & held_out)
        self.own, self.validation = own, self.rows
        if own is not None:
            self.validation = FusionRows([own] * len(stores), pad_token_id, lay=lay)
            self.validation_rows = np.arange(len(own))
        if not len(self.train_rows):
            see = "see chat.path and data.validation_fraction"
            raise UserError(f"{pivot.path} leaves no chat with a response to train on; {see}")
        counts = len(self.train_rows), len(self.validation_rows), (~usable).sum()
        LOG.info("%d chats to train on, %d to validate, %d without a response", *counts)

    def coverage(self) -> list[float]:
        """Share of the pivot's response positions at which each source has a distribution."""
        total = max(1, int(self.responses.sum()))
        return [
            sum(e["statistics"]["positions_with_mass"] for e in store.manifest["shards"]) / total
            for store in self.stores[1:]
        ]

    def train_dataloader(self) -> DataLoader[FusionBatch]:
        """Batches of this rank, shuffled and bucketed by length."""
        return PlannedLoader(self.rows, self.train_plan(), self, self.settings.num_workers)

    def val_dataloader(self) -> DataLoader[FusionBatch] | list[Any]:
        """The held-out chats, or one's own, in order."""
        if not len(self.validation_rows):
            return []
        return PlannedLoader(self.validation, self._plan(self.validation_rows, None), self)

    def train_plan(self) -> Plan:
        """Who takes which chats to train on."""
        return self._plan(self.train_rows, self.settings.shuffle_seed)

    def _plan(self, rows: Ints, seed: int | None) -> Plan:
        assert self.trainer is not None
        rank, world, data = self.trainer.global_rank, self.trainer.world_size, self.settings
        size = share(data.global_batch, data.batch_size, world).batch_size
        step = data.global_batch if seed is not None else size * world
        options: dict[str, Any] = {"batch_size": size, "rank": rank, "world": world, "bucket": data.bucket}
        responses = self.responses if seed is not None else self.validation.scalars["tokens"][:, 0].numpy()
        return Plan(rows, self.lengths, responses, step=step, seed=seed, **options)
