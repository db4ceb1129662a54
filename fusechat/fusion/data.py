"""FusionDataModule: zips the pivot's and the aligned stores by row, memory-mapped, into sparse batches.

The order of chats is a plan made from seed, epoch and step: it does not depend on how many devices or micro-batches
share a step, and a resumed run takes it up at the step where it stopped, on as many devices as it has then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fusechat.app import settings
from fusechat.app.errors import UserError
from fusechat.chats.formats import in_validation
from fusechat.chats.padding import pad
from fusechat.fusion.ranks import share
from fusechat.stores.common import CommonText
from fusechat.stores.distributions import NEG_INF
from fusechat.stores.encoding import Array, decode_logprobs
from fusechat.stores.store import DistributionStore

LOG = logging.getLogger(__name__)
Ints = npt.NDArray[np.int64]
LARGEST = 1e-2  # log-probabilities above are no rounding any more


@dataclass(frozen=True)
class Data:
    """What is trained on, in which order. global_batch: chats of an optimizer step; batch_size: at most so many at a
    time on a device, None: all of its part; validation_fraction: chats held out by content hash and split_seed;
    shuffle_seed: the order; bucket: steps sorted by length together, 1: none; num_workers: DataLoader processes;
    max_tokens: longer chats are an error, None: the caller's ``max_length`` decides.
    """

    global_batch: int = 8
    batch_size: int | None = None
    validation_fraction: float = 0.05
    split_seed: int = 0
    shuffle_seed: int = 0
    num_workers: int = 0
    bucket: int = 16
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        settings.check("data", **vars(self))


@dataclass
class FusionBatch:
    """B chats of T tokens with N response positions in all, and S models' distributions of K entries there.

    input_ids, attention_mask [B, T]; at [N], each position's place in the flattened [B * T]; gold, sequence [N];
    ids, logprobs [S, N, K]; gold_logprob [S, N]; nats, n_bytes, n_tokens [B, S] of what each model predicts;
    common_nats [B, S] and common_bytes [B, 1] of the text that all of them predict. step_tokens: response tokens of the
    whole optimizer step, over all its micro-batches and ranks.
    """

    input_ids: Tensor
    attention_mask: Tensor
    at: Tensor
    gold: Tensor
    sequence: Tensor
    ids: Tensor
    logprobs: Tensor
    gold_logprob: Tensor
    nats: Tensor
    n_bytes: Tensor
    n_tokens: Tensor
    common_nats: Tensor
    common_bytes: Tensor
    step_tokens: Tensor
    tags: list[str]


@dataclass(frozen=True)
class Draw:
    """The chats of one micro-batch on one rank, and the response tokens of the optimizer step it belongs to.

    No chats: a rank that has none where others do runs the model on one padding token, for the others wait for it.
    """

    rows: list[int]
    step_tokens: int


@dataclass(frozen=True)
class Entries:
    """A model's entries at a batch's N positions, end to end. counts, gold_logprob [N]; ids, logprobs [Σ counts]."""

    counts: Array
    ids: Array
    logprobs: Array
    gold_logprob: Array


NOWHERE = np.zeros(0, np.int64)
SILENT = Entries(NOWHERE, NOWHERE, NOWHERE, NOWHERE)


class FusionRows(Dataset[FusionBatch]):
    """Batches by `Draw`. stores: the pivot's first, then the aligned sources', row by row of the same chats."""

    def __init__(self, stores: Sequence[DistributionStore], pad_token_id: int) -> None:
        self.stores, self.pad_token_id = list(stores), pad_token_id
        self.scalars = {
            name: torch.from_numpy(np.stack([s.column(name) for s in stores], 1))
            for name in ("nats", "bytes", "tokens")
        }
        self.common = CommonText(stores)

    def __getitem__(self, draw: Draw) -> FusionBatch:
        chats = [self.stores[0].row(row, "input_ids", "positions") for row in draw.rows]
        input_ids, attention_mask = pad([ids for ids, _ in chats] or [[self.pad_token_id]], self.pad_token_id)
        sequence = np.repeat(np.arange(len(chats)), np.array([len(positions) for _, positions in chats], int))
        at = np.concatenate([NOWHERE, *(positions for _, positions in chats)]) + sequence * input_ids.shape[1]
        models = [self._entries(store, draw.rows, len(at)) if chats else SILENT for store in self.stores]
        ids, logprobs = self._rectangle(models)
        common_nats, common_bytes = self.common(draw.rows)
        return FusionBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            at=torch.from_numpy(at),
            gold=input_ids.reshape(-1)[at + 1],  # position t predicts the token after t
            sequence=torch.from_numpy(sequence),
            ids=torch.from_numpy(ids),
            logprobs=torch.from_numpy(logprobs),
            gold_logprob=torch.from_numpy(np.stack([m.gold_logprob for m in models]).astype(np.float32)),
            nats=self.scalars["nats"][draw.rows].float(),
            n_bytes=self.scalars["bytes"][draw.rows].float(),
            n_tokens=self.scalars["tokens"][draw.rows].float(),
            common_nats=torch.from_numpy(common_nats).float(),
            common_bytes=torch.from_numpy(common_bytes).float(),
            step_tokens=torch.tensor(float(draw.step_tokens)),
            tags=[self.stores[0].text(row, "tag") for row in draw.rows],
        )

    def _entries(self, store: DistributionStore, rows: list[int], n: int) -> Entries:
        """A model's entries in some chats. Raises `UserError` where they do not fit the pivot's n positions or ids."""
        columns = [store.row(row, "counts", "ids", "logprobs", "gold_logprob") for row in rows]
        counts, ids, stored, gold_logprob = (np.concatenate(parts) for parts in zip(*columns, strict=True))
        logprobs = decode_logprobs(stored)
        again = "align again with overwrite=true"
        if len(counts) != n:
            raise UserError(f"{store.path} has {len(counts)} positions where the pivot has {n}; {again}")
        if len(ids) and (int(ids.max()) >= self.stores[0].manifest["vocab_size"] or not logprobs.max() <= LARGEST):
            raise UserError(f"{store.path} holds ids beyond the pivot's vocabulary, NaN or inf; {again}")
        return Entries(counts, ids, logprobs, gold_logprob)

    @staticmethod
    def _rectangle(models: Sequence[Entries]) -> tuple[Array, Array]:
        """ids and log-probabilities of S models, [S, N, K] each; spare entries are id 0 of log-probability -inf."""
        n, kept = len(models[0].counts), max(1, *(int(m.counts.max(initial=0)) for m in models))
        ids = np.zeros((len(models), n, kept), np.int32)
        logprobs = np.full((len(models), n, kept), NEG_INF, np.float32)
        for s, model in enumerate(models):
            k = int(model.counts[0]) if n else 0
            if k and (model.counts == k).all():  # much faster than a mask
                ids[s, :, :k], logprobs[s, :, :k] = model.ids.reshape(n, k), model.logprobs.reshape(n, k)
            else:
                present = np.arange(kept) < model.counts[:, None]
                ids[s][present], logprobs[s][present] = model.ids, model.logprobs
        return ids, logprobs


class Plan(Sampler[Draw]):
    """Which chats each rank takes, epoch by epoch.

    An optimizer step has ``step`` chats, the last of an epoch what is left; which they are depends on rows, lengths,
    seed and step alone. A step is taken in micro-batches, in each of which each of ``world`` ranks takes ``batch_size``
    chats or what is left. rows: the chats of an epoch; lengths and responses: tokens of every chat of the stores. seed
    None: in order. bucket: steps whose chats are sorted by length together. ``start``: optimizer steps that a resumed
    epoch has done already.
    """

    def __init__(
        self,
        rows: Ints,
        lengths: Ints,
        responses: Ints,
        *,
        step: int,
        batch_size: int,
        rank: int,
        world: int,
        seed: int | None,
        bucket: int,
    ) -> None:
        self.rows, self.lengths, self.responses = rows, lengths, responses
        self.rank, self.world, self.seed, self.bucket = rank, world, seed, bucket
        self.step, self.micro_batch = step, batch_size * world
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning: every epoch has its own order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.micro_batches(self.optimizer_steps)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-len(self.rows) // self.step)

    def micro_batches(self, steps: int) -> int:
        """How many micro-batches the first so many optimizer steps of an epoch have."""
        whole, rest = divmod(min(steps * self.step, len(self.rows)), self.step)
        return whole * -(-self.step // self.micro_batch) + -(-rest // self.micro_batch)

    def steps_done(self, micro_batches: int) -> int:
        """How many optimizer steps of an epoch so many micro-batches complete."""
        whole = micro_batches // -(-self.step // self.micro_batch)
        return self.optimizer_steps if micro_batches >= len(self) else whole

    def __iter__(self) -> Iterator[Draw]:
        start, self.start = self.start, 0
        for step in self._steps()[start:]:
            step_tokens = int(self.responses[step].sum())
            for first in range(0, len(step), self.micro_batch):
                together = step[first : first + self.micro_batch]
                yield Draw(together[self.rank :: self.world].tolist(), step_tokens)

    def _steps(self) -> list[Ints]:
        """The chats of each optimizer step: shuffled, then those of similar length put together.

        Chats are shuffled; ``bucket`` steps' worth of them at a time is sorted by length and cut into steps; then the
        order of the steps is shuffled. The last, incomplete step stays last.
        """
        if self.seed is None:
            return _cut(self.rows, self.step)
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.rows)
        in_whole_steps = len(order) - len(order) % self.step
        pools = _cut(order[:in_whole_steps], self.step * self.bucket)
        by_length = [pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools]
        steps = [step for pool in by_length for step in _cut(pool, self.step)]
        shuffled = [steps[i] for i in rng.permutation(len(steps))]
        return shuffled + _cut(order[in_whole_steps:], self.step)


def _cut(rows: Ints, size: int) -> list[Ints]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


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


def open_stores(pivot: Path, aligned: Sequence[Path], remedies: Sequence[str] = ()) -> list[DistributionStore]:
    """The pivot's distributions and what was aligned to them, in this order. remedies: the command that makes each.

    Raises `UserError` with the command to run where a store is missing, unfinished or made from something else.
    """
    commands = [*remedies] or ["python -m fusechat.extract", *["python -m fusechat.align"] * len(aligned)]
    stores = [DistributionStore(path, remedy) for path, remedy in zip([pivot, *aligned], commands, strict=True)]
    first = stores[0]
    for store, remedy in zip(stores[1:], commands[1:], strict=True):
        again = f"run: {remedy} overwrite=true"
        if store.manifest["pivot"] != first.fingerprint:
            raise UserError(f"{store.path} was aligned with other pivot distributions than {first.path}; {again}")
        if len(store) != len(first):
            raise UserError(f"{store.path} has {len(store)} chats where {first.path} has {len(first)}; {again}")
    return stores


class FusionDataModule(lightning.LightningDataModule):
    """Splits the chats of opened stores by content hash, and batches them.

    max_tokens: the longest chat that is allowed; vocab_size: rows of the pivot's embedding; own: chats to validate with
    in place of a part of the stores'. Raises `UserError` where a chat is longer, a store has more ids, or no chat is
    left to train on.
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
    ) -> None:
        super().__init__()
        self.stores, self.settings, pivot = list(stores), data, stores[0]
        if (ids := pivot.manifest["vocab_size"]) > vocab_size:
            known = f"the model's embedding {vocab_size} rows"
            raise UserError(f"{pivot.path} has ids up to {ids}, {known}; set pivot.path")
        self.rows = FusionRows(stores, pad_token_id)
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
            self.validation, self.validation_rows = FusionRows([own] * len(stores), pad_token_id), np.arange(len(own))
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
