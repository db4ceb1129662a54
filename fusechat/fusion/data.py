"""FusionDataModule: zips the pivot's and the aligned stores by row, memory-mapped, into sparse batches.

The order of chats is a plan made from the seed: its optimizer steps do not depend on how many devices or
micro-batches share them, and a resumed run takes it up where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fusechat.app.errors import UserError
from fusechat.chats.formats import in_validation
from fusechat.stores.distributions import NEG_INF
from fusechat.stores.encoding import Array, decode_logprobs
from fusechat.stores.store import DistributionStore

LOG = logging.getLogger(__name__)
Ints = npt.NDArray[np.int64]
LARGEST = 1e-2  # log-probabilities above are no rounding any more


@dataclass
class FusionBatch:
    """B chats of T tokens with N response positions in all, and S models' distributions of K entries there.

    input_ids, attention_mask [B, T]; at [N], each position's place in the flattened [B * T]; gold, sequence [N];
    ids, logprobs [S, N, K]; gold_logprob [S, N]; nats, n_bytes, n_tokens [B, S]. step_tokens: response tokens of the
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
    step_tokens: Tensor
    tags: list[str]


@dataclass(frozen=True)
class Draw:
    """The chats of one micro-batch on one rank, and the response tokens of the optimizer step it belongs to."""

    rows: list[int]
    step_tokens: int


class FusionRows(Dataset[FusionBatch]):
    """Batches by `Draw`. stores: the pivot's first, then the aligned sources'."""

    def __init__(self, stores: Sequence[DistributionStore], pad: int) -> None:
        self.stores, self.pad = list(stores), pad
        self.scalars = {
            name: torch.from_numpy(np.stack([s.column(name) for s in stores], 1))
            for name in ("nats", "bytes", "tokens")
        }
        self.tags = stores[0].column("tag")

    def __getitem__(self, draw: Draw) -> FusionBatch:
        rows = draw.rows
        chats = [self.stores[0].row(row, "input_ids", "positions") for row in rows]
        width = max(len(ids) for ids, _ in chats)
        input_ids = np.full((len(rows), width), self.pad, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        for b, (ids, _) in enumerate(chats):
            input_ids[b, : len(ids)], mask[b, : len(ids)] = ids, 1
        lengths = [len(positions) for _, positions in chats]
        sequence = np.repeat(np.arange(len(rows)), lengths)
        at = np.concatenate([positions for _, positions in chats]) + sequence * width
        parts = [self._columns(store, rows, len(at)) for store in self.stores]
        kept = max(1, *(int(counts.max(initial=0)) for counts, *_ in parts))
        all_ids, logprobs = (
            np.zeros((len(parts), len(at), kept), np.int32),
            np.full((len(parts), len(at), kept), NEG_INF, np.float32),
        )
        for s, part in enumerate(parts):
            self._fill(self.stores[s], all_ids[s], logprobs[s], *part[:3])
        gold_logprob = torch.from_numpy(np.stack([gold for *_, gold in parts]).astype(np.float32))
        gold = torch.from_numpy(input_ids.reshape(-1)[at + 1])
        nats, n_bytes, n_tokens = (self.scalars[name][rows] for name in ("nats", "bytes", "tokens"))
        return FusionBatch(
            torch.from_numpy(input_ids),
            torch.from_numpy(mask),
            torch.from_numpy(at),
            gold,
            torch.from_numpy(sequence),
            torch.from_numpy(all_ids),
            torch.from_numpy(logprobs),
            gold_logprob,
            nats.float(),
            n_bytes.float(),
            n_tokens.float(),
            torch.tensor(float(draw.step_tokens)),
            [str(self.tags[row]) for row in rows],
        )

    def _columns(self, store: DistributionStore, rows: list[int], n: int) -> list[Array]:
        """counts [n], ids, log-probabilities as stored, gold_logprob [n] of the rows, end to end."""
        columns = [store.row(row, "counts", "ids", "logprobs", "gold_logprob") for row in rows]
        found = [np.concatenate(part) for part in zip(*columns, strict=True)]
        if len(found[0]) != n:
            raise UserError(
                f"{store.path} has {len(found[0])} positions where the pivot has {n}; align again with overwrite=true"
            )
        return found

    def _fill(
        self, store: DistributionStore, out_ids: Array, out: Array, counts: Array, ids: Array, stored: Array
    ) -> None:
        """Writes one model's entries into its part of the batch, [N, K] each."""
        logprobs = decode_logprobs(stored)
        if len(ids) and (int(ids.max()) >= self.stores[0].manifest["vocab_size"] or not logprobs.max() <= LARGEST):
            raise UserError(
                f"{store.path} holds ids beyond the pivot's vocabulary, NaN or inf; align again with overwrite=true"
            )
        width = int(counts[0]) if len(counts) else 0
        if (counts == width).all():
            out_ids[:, :width], out[:, :width] = (
                ids.reshape(-1, width or 1)[:, :width],
                logprobs.reshape(-1, width or 1)[:, :width],
            )
            return
        present = np.arange(out.shape[1]) < counts[:, None]
        out_ids[present], out[present] = ids, logprobs


class Plan(Sampler[Draw]):
    """The draws of one rank, epoch by epoch. ``start`` skips what a resumed epoch has done already."""

    def __init__(
        self,
        rows: Ints,
        lengths: Ints,
        responses: Ints,
        *,
        batch_size: int,
        accumulate: int,
        rank: int,
        world: int,
        seed: int | None,
        bucket: int,
    ) -> None:
        self.rows, self.lengths, self.responses = rows, lengths, responses
        self.batch_size, self.accumulate, self.rank, self.world = batch_size, accumulate, rank, world
        self.seed, self.bucket, self.epoch, self.start = seed, bucket, 0, 0
        micro = batch_size * world
        left = len(rows) % micro
        self.used = len(rows) - (left if left < world else 0)  # every rank gets a chat, or none does
        self.micro_batches = -(-self.used // micro)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning: every epoch has its own order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.micro_batches

    def __iter__(self) -> Iterator[Draw]:
        start, self.start = self.start, 0
        for number, draw in enumerate(self._draws()):
            if number >= start:
                yield draw

    def _draws(self) -> Iterator[Draw]:
        micro = self.batch_size * self.world
        for step in self._steps():
            tokens = int(self.responses[step].sum())
            for first in range(0, len(step), micro):
                yield Draw(step[first : first + micro][self.rank :: self.world].tolist(), tokens)

    def _steps(self) -> list[Ints]:
        """The chats of each optimizer step: shuffled, then those of similar length put together."""
        size = self.batch_size * self.world * self.accumulate
        if self.seed is None:
            return [self.rows[i : i + size] for i in range(0, self.used, size)]
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.rows)[: self.used]
        cut = self.used - self.used % size
        pools = [order[i : i + size * self.bucket] for i in range(0, cut, size * self.bucket)]
        pools = [pool[: len(pool) - len(pool) % size] for pool in pools]
        ordered = [pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools]
        steps = [pool[i : i + size] for pool in ordered for i in range(0, len(pool), size)]
        shuffled = [steps[i] for i in rng.permutation(len(steps))]
        return shuffled + ([order[cut:]] if cut < self.used else [])


class ResumableLoader(DataLoader[FusionBatch]):
    """A DataLoader that Lightning can save and resume in mid-epoch: the state is how many batches are done."""

    def __init__(self, data: FusionRows, plan: Plan, module: FusionDataModule) -> None:
        super().__init__(
            data,
            sampler=plan,
            batch_size=None,
            num_workers=module.num_workers,
            persistent_workers=module.num_workers > 0,
        )
        self.plan, self.module = plan, module

    def state_dict(self) -> dict[str, int]:
        """Batches of this epoch that training has taken (not those fetched ahead)."""
        assert self.module.trainer is not None
        done = int(self.module.trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        return {"done": done, "epoch": self.module.trainer.current_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on after the batches that were done; a finished epoch is followed by a new one."""
        unfinished = state["done"] < len(self.plan)
        self.plan.epoch, self.plan.start = (state["epoch"], state["done"]) if unfinished else (state["epoch"] + 1, 0)


class FusionDataModule(lightning.LightningDataModule):
    """Opens the stores, checks that they belong together, and splits chats by content hash.

    Raises `UserError` with the command to run where a store is missing, unfinished or made from something else.
    """

    def __init__(
        self,
        pivot_store: str,
        aligned_stores: Sequence[str],
        *,
        batch_size: int,
        validation_fraction: float,
        split_seed: int,
        shuffle_seed: int,
        bucket: int,
        max_tokens: int,
        pad_token_id: int,
        vocab_size: int,
        num_workers: int = 0,
        remedies: Sequence[str] = (),
    ) -> None:
        super().__init__()
        commands = [*remedies, *[""] * (len(aligned_stores) + 1)]
        self.stores = [
            DistributionStore(path, command)
            for path, command in zip([pivot_store, *aligned_stores], commands, strict=False)
        ]
        pivot = self.stores[0]
        for store, command in zip(self.stores[1:], commands[1:], strict=False):
            if store.manifest["pivot"] != pivot.fingerprint:
                raise UserError(
                    f"{store.path} was aligned with other pivot distributions than {pivot.path}; run: {command} overwrite=true"
                )
            if len(store) != len(pivot):
                raise UserError(
                    f"{store.path} has {len(store)} chats where {pivot.path} has {len(pivot)}; run: {command} overwrite=true"
                )
        if pivot.manifest["vocab_size"] > vocab_size:
            raise UserError(
                f"{pivot.path} has ids up to {pivot.manifest['vocab_size']}, the model's embedding {vocab_size} rows; set pivot.path"
            )
        self.batch_size, self.bucket, self.shuffle_seed, self.num_workers = (
            batch_size,
            bucket,
            shuffle_seed,
            num_workers,
        )
        self.data = FusionRows(self.stores, pad_token_id)
        responses = self.data.scalars["tokens"][:, 0].numpy().astype(np.int64)
        self.responses = responses
        self.lengths = np.array([len(pivot.row(i, "input_ids")[0]) for i in range(len(pivot))])
        if (longest := int(self.lengths.max())) > max_tokens:
            raise UserError(
                f"a chat of {longest} tokens exceeds {max_tokens}, the model's context or data.max_tokens; extract with chat.max_length"
            )
        validation = np.array([in_validation(i, validation_fraction, split_seed) for i in pivot.column("id")])
        usable = responses > 0
        self.train_rows, self.validation_rows = (np.flatnonzero(usable & part) for part in (~validation, validation))
        if not len(self.train_rows):
            raise UserError(
                f"{pivot.path} leaves no chat with a response to train on; see chat.path and data.validation_fraction"
            )
        LOG.info(
            "%d chats to train on, %d to validate, %d without a response",
            len(self.train_rows),
            len(self.validation_rows),
            (~usable).sum(),
        )

    @property
    def fingerprints(self) -> list[str]:
        """Of every store, the pivot's first."""
        return [store.fingerprint for store in self.stores]

    def coverage(self) -> list[float]:
        """Share of the pivot's response positions at which each source has a distribution."""
        total = max(1, int(self.responses.sum()))
        return [
            sum(e["statistics"]["positions_with_mass"] for e in store.manifest["shards"]) / total
            for store in self.stores[1:]
        ]

    def train_dataloader(self) -> DataLoader[FusionBatch]:
        """Batches of this rank, shuffled and bucketed by length."""
        return ResumableLoader(self.data, self._plan(self.train_rows, self.shuffle_seed), self)

    def val_dataloader(self) -> DataLoader[FusionBatch] | list[Any]:
        """The held-out chats, in order."""
        if not len(self.validation_rows):
            return []
        return DataLoader(self.data, sampler=self._plan(self.validation_rows, None), batch_size=None)

    def _plan(self, rows: Ints, seed: int | None) -> Plan:
        assert self.trainer is not None
        return Plan(
            rows,
            self.lengths,
            self.responses,
            batch_size=self.batch_size,
            accumulate=self.trainer.accumulate_grad_batches if seed is not None else 1,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            seed=seed,
            bucket=self.bucket,
        )
