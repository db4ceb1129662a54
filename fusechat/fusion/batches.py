"""Batches of sparse distributions: the pivot's and the aligned stores zipped by row, memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusechat.app.errors import UserError
from fusechat.chats.padding import Layout, padded, reading
from fusechat.fusion.plan import Draw
from fusechat.stores.common import CommonText, chunks, places
from fusechat.stores.distributions import NEG_INF
from fusechat.stores.encoding import Array, decode_logprobs, decode_mask
from fusechat.stores.store import DistributionStore

LARGEST = 1e-2  # log-probabilities above are no rounding any more


@dataclass
class FusionBatch:
    """B chats of T tokens with N response positions in all, and S models' distributions of K entries there.

    input_ids, attention_mask [B, T], or [R, T] where chats share R rows: position_ids [R, T] tell them apart then;
    at [N], each position's place in the flattened [B * T]; gold, sequence [N], the token and the chat;
    ids, logprobs [S, N, K]; gold_logprob [S, N]; nats, n_bytes, n_tokens [B, S] of what each model predicts;
    chunk, chunk_nats [S, N], for a loss on chunks of text: see `fusechat.stores.common.chunks`, else [S, 0];
    shared [S, V]: the pivot's tokens that each model has, for a loss that is split, else [S, 0];
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
    chunk: Tensor
    chunk_nats: Tensor
    shared: Tensor
    nats: Tensor
    n_bytes: Tensor
    n_tokens: Tensor
    common_nats: Tensor
    common_bytes: Tensor
    step_tokens: Tensor
    tags: list[str]
    position_ids: Tensor | None = None

    @property
    def read(self) -> dict[str, Tensor]:
        """What a model is given."""
        return reading(self.input_ids, self.attention_mask, self.position_ids)


@dataclass(frozen=True)
class Entries:
    """A model's entries at a batch's N positions, end to end. counts, gold_logprob [N]; ids, logprobs [Σ counts]."""

    counts: Array
    ids: Array
    logprobs: Array
    gold_logprob: Array


EMPTY = np.zeros(0, np.int64)
SILENT = Entries(EMPTY, EMPTY, EMPTY, EMPTY)


class FusionRows(Dataset[FusionBatch]):
    """Batches by `Draw`. stores: the pivot's first, then the aligned sources', row by row of the same chats.

    chunked: whether they say which chunk of text each position lies in; split: which tokens each model has. lay: how
    chats become rows of tokens.
    """

    def __init__(
        self,
        stores: Sequence[DistributionStore],
        pad_token_id: int,
        chunked: bool = False,
        lay: Layout = padded,
        split: bool = False,
    ) -> None:
        self.stores, self.pad_token_id, self.chunked, self.lay = list(stores), pad_token_id, chunked, lay
        masks = [shared_tokens(store) if split else np.zeros(0, bool) for store in stores]
        self.shared = torch.from_numpy(np.stack(masks))
        self.scalars = {
            name: torch.from_numpy(np.stack([s.column(name) for s in stores], 1))
            for name in ("nats", "bytes", "tokens")
        }
        self.common = CommonText(stores)

    def __getitem__(self, draw: Draw) -> FusionBatch:
        chats = [self.stores[0].row(row, "input_ids", "positions") for row in draw.rows]
        laid = self.lay([ids for ids, _ in chats] or [[self.pad_token_id]], self.pad_token_id)
        sequence = np.repeat(np.arange(len(chats)), np.array([len(positions) for _, positions in chats], int))
        at = np.concatenate([EMPTY, *(positions for _, positions in chats)]) + laid.starts.numpy()[sequence]
        models = [self._entries(store, draw.rows, len(at)) if chats else SILENT for store in self.stores]
        ids, logprobs = self._rectangle(models)
        common_nats, common_bytes = self.common(draw.rows)
        chunk, chunk_nats = self._chunks(draw.rows)
        return FusionBatch(
            input_ids=laid.ids,
            attention_mask=laid.mask,
            position_ids=laid.positions,
            at=torch.from_numpy(at),
            gold=laid.ids.reshape(-1)[at + 1],  # position t predicts the token after t
            sequence=torch.from_numpy(sequence),
            ids=torch.from_numpy(ids),
            logprobs=torch.from_numpy(logprobs),
            gold_logprob=torch.from_numpy(np.stack([m.gold_logprob for m in models]).astype(np.float32)),
            chunk=torch.from_numpy(chunk),
            chunk_nats=torch.from_numpy(chunk_nats).float(),
            shared=self.shared,
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
        if len(ids) and (int(ids.max()) >= self._n_ids(store, counts) or not logprobs.max() <= LARGEST):
            raise UserError(f"{store.path} holds ids beyond the pivot's vocabulary, NaN or inf; {again}")
        return Entries(counts, ids, logprobs, gold_logprob)

    def _n_ids(self, store: DistributionStore, counts: Array) -> int:
        """The pivot's vocabulary and, where a store holds some by rank, the ranks."""
        size, ranked = self.stores[0].manifest["vocab_size"], "common" in store.manifest
        return int(size) + (int(counts.max()) if ranked else 0)

    def _chunks(self, rows: list[int]) -> tuple[Array, Array]:
        """The chunk of every position, numbered on from chat to chat, and its nats, for S models: [S, N] each."""
        numbers, nats = [[EMPTY] for _ in self.stores], [[np.empty(0)] for _ in self.stores]
        for row in rows if self.chunked else ():
            pivot = places(self.stores[0], row)
            for s, store in enumerate(self.stores):
                number, of_chunk = chunks(CommonText.spent(store, row, pivot))
                numbers[s].append(number + numbers[s][-1].max(initial=0) + 1)
                nats[s].append(of_chunk)
        return np.stack([np.concatenate(each) for each in numbers]), np.stack([np.concatenate(each) for each in nats])

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


def shared_tokens(store: DistributionStore) -> Array:
    """The pivot's tokens that a store's model has too, bool [V]; all of them where it has the pivot's vocabulary."""
    size = store.manifest["vocab_size"]
    return decode_mask(store.manifest["common"], size) if "common" in store.manifest else np.ones(size, bool)
