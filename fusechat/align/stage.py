"""From a source's store to an aligned store: shard by shard, resumable, in as many processes as asked."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from fusechat.align.maps import special_roles
from fusechat.align.projection import Ragged, gold_path, project
from fusechat.align.sequence import KINDS, Ints, align_dtw, align_offsets
from fusechat.app.errors import UserError
from fusechat.stores.encoding import decode_logprobs, encode_counts, encode_logprobs, narrowest
from fusechat.stores.store import DistributionStore, StoreWriter, list_column


@dataclass
class Alignment:
    """How one source is aligned with the pivot; picklable, so that processes share it.

    table: source id -> pivot id, None for uld. texts: (pivot, source) token texts for dtw, else None.
    """

    pivot: DistributionStore
    source: DistributionStore
    sequence: str
    unmatched: str
    chained: bool
    logprobs: str
    table: Ints | None = None
    texts: tuple[list[str], list[str]] | None = None
    rows_by_shard: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        starts = np.cumsum([0, *(entry["rows"] for entry in self.source.manifest["shards"])])
        self.rows_by_shard = [*zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]

    def match(self, row: int) -> tuple[Ints, Any]:
        """match and kind of one chat, see `fusechat.align.sequence`."""
        (theirs,), (own,) = self.pivot.row(row, "boundaries"), self.source.row(row, "boundaries")
        if self.texts is None:
            return align_offsets(theirs, own)
        match, kind = np.full(len(theirs), -1, np.int64), np.full(len(theirs), 3, np.uint8)
        if not len(own):
            return match, kind
        pivot_turns, source_turns = self._turns(self.pivot, row), self._turns(self.source, row)
        for (at, pivot_ids), (begin, source_ids) in zip(pivot_turns, source_turns, strict=False):
            found, kinds = align_dtw([self.texts[0][i] for i in pivot_ids], [self.texts[1][i] for i in source_ids])
            match[at : at + len(found)] = np.where(found >= 0, found + begin, -1)
            kind[at : at + len(found)] = kinds
        return match, kind

    def shard(self, index: int) -> tuple[pa.Table, dict[str, Any]]:
        """One shard of the source, aligned and projected."""
        first, last = self.rows_by_shard[index]
        columns: dict[str, list[Any]] = {key: [] for key in ("counts", "ids", "logprobs", "gold_logprob", "kind")}
        seen: Counter[str] = Counter()
        for row in range(first, last):
            result, kind = self._row(row)
            kept = np.exp(result.logprobs).sum() if len(result.ids) else 0.0
            for key in ("counts", "ids", "logprobs", "gold_logprob"):
                columns[key].append(getattr(result, key))
            columns["kind"].append(kind)
            seen.update({name: int((kind == k).sum()) for k, name in enumerate(KINDS)} | {"mass": float(kept)})
            matched = kind != 3
            seen["matched_nats"] += float(-result.gold_logprob[matched].sum())  # type: ignore[assignment]
            seen["positions_with_mass"] += int((result.counts > 0).sum())
        scalars = self.source._tables[index].select(["id", "nats", "bytes", "tokens"])
        lists = {
            "counts": list_column([encode_counts(c) for c in columns["counts"]], np.uint16),
            "ids": list_column(columns["ids"], narrowest(self.pivot.manifest["vocab_size"] - 1)),
            "logprobs": list_column(
                [encode_logprobs(r, self.logprobs) for r in columns["logprobs"]], np.dtype(self.logprobs)
            ),
            "gold_logprob": list_column(columns["gold_logprob"], np.float16),
            "kind": list_column(columns["kind"], np.uint8),
        }
        return pa.table({**{n: scalars.column(n) for n in scalars.column_names}, **lists}), dict(seen)

    def pair_counts(self, index: int) -> tuple[Ints, Ints]:
        """Co-occurrences of source and pivot tokens at partnered positions: source_id * pivot vocabulary + pivot_id, counts."""
        size, keys = self.pivot.manifest["vocab_size"], [np.empty(0, np.int64)]
        for row in range(*self.rows_by_shard[index]):
            match, _ = self.match(row)
            at = np.flatnonzero(match >= 0)
            keys.append(_gold(self.source, row)[match[at]] * size + _gold(self.pivot, row)[at])
        return np.unique(np.concatenate(keys), return_counts=True)

    def _row(self, row: int) -> tuple[Ragged, Any]:
        match, kind = self.match(row)
        counts, ids, logprobs, gold_logprob = self.source.row(row, "counts", "ids", "logprobs", "gold_logprob")
        source = Ragged(counts.astype(np.int64), ids, decode_logprobs(logprobs), gold_logprob.astype(np.float32))
        if self.table is None:
            return _ranked(source, match), kind
        if len(ids) and int(ids.max()) >= len(self.table):
            raise UserError(
                f"{self.source.path}, row {row}: token id {int(ids.max())} is beyond the tokenizer's {len(self.table)} tokens; "
                "give the tokenizer that the store was extracted with (source.path)"
            )
        gold, chain = _gold(self.pivot, row), np.full((len(match), 3), -1, np.int64)
        if self.chained:
            (theirs,), (own,) = self.pivot.row(row, "boundaries"), self.source.row(row, "boundaries")
            chain = gold_path(theirs, own, match, _gold(self.source, row))
        size = self.pivot.manifest["vocab_size"]
        return project(source, match, self.table, gold, chain, size, self.unmatched == "gold"), kind

    def _turns(self, store: DistributionStore, row: int) -> list[tuple[int, Ints]]:
        (positions,) = store.row(row, "positions")
        gold = _gold(store, row)
        cuts = np.flatnonzero(np.diff(positions.astype(np.int64)) != 1) + 1
        return [*zip([0, *cuts.tolist()], np.split(gold, cuts), strict=True)]


def write_aligned(alignment: Alignment, writer: StoreWriter, num_proc: int) -> None:
    """Writes the shards that are not there yet; the result does not depend on ``num_proc``."""
    todo = [i for i in range(writer.total) if writer.done(i) is None]
    for index, (table, statistics) in zip(todo, each_shard(alignment, Alignment.shard, todo, num_proc), strict=True):
        writer.write(index, table, statistics)


def each_shard(alignment: Alignment, work: Any, shards: list[int], num_proc: int) -> Any:
    """``work(alignment, shard)`` for every shard, in order."""
    if num_proc == 1:
        return (work(alignment, index) for index in shards)
    pool = ProcessPoolExecutor(num_proc)
    return pool.map(work, [alignment] * len(shards), shards)


def same_tokens(pivot: DistributionStore, source: DistributionStore) -> bool:
    """Whether both stores hold the same ids for every chat: the vocabularies are shared and nothing is to be aligned."""
    return len(pivot) == len(source) and all(
        all(
            np.array_equal(a, b)
            for a, b in zip(
                pivot.row(i, "input_ids", "positions"), source.row(i, "input_ids", "positions"), strict=True
            )
        )
        for i in range(len(pivot))
    )


def link_shards(source: DistributionStore, writer: StoreWriter) -> None:
    """Passes a store through: hard links to the source's shards, no second copy (a copy where links are impossible)."""
    import shutil

    for index, entry in enumerate(source.manifest["shards"]):
        name = writer.path / entry["file"]
        if writer.done(index) is None:
            name.unlink(missing_ok=True)
            try:
                os.link(source.path / entry["file"], name)
            except OSError:
                shutil.copyfile(source.path / entry["file"], name)
            positions = entry["statistics"]["positions"]
            statistics = {"same": positions, "n:1": 0, "1:n": 0, "none": 0, "matched_nats": entry["statistics"]["nats"]}
            writer.record(
                index, {**entry, "statistics": {**statistics, "positions_with_mass": positions, "mass": float("nan")}}
            )


def check_chats(pivot: DistributionStore, source: DistributionStore) -> None:
    """Raises `UserError` where two stores are not of the same chats in the same order."""
    if pivot.manifest["chats"] != source.manifest["chats"] or len(pivot) != len(source):
        raise UserError(
            f"{source.path} ({len(source)} chats) and {pivot.path} ({len(pivot)}) hold different chats; "
            "extract both with the same chat.path and chat.limit"
        )


def check_texts(pivot: DistributionStore, source: DistributionStore, tokenizers: tuple[Any, Any]) -> None:
    """Raises `UserError` where a chat's assistant text differs between two renderings, with both excerpts."""
    theirs, own = pivot.column("text_hash"), source.column("text_hash")
    differing = np.flatnonzero(theirs != own)
    if len(differing):
        row = int(differing[0])
        texts = [
            t.decode(_gold(s, row), skip_special_tokens=True) for t, s in zip(tokenizers, (pivot, source), strict=True)
        ]
        at = len(os.path.commonprefix(texts))
        excerpts = " / ".join(repr(text[max(0, at - 20) : at + 20]) for text in texts)
        raise UserError(
            f"{len(differing)} chats read differently after rendering; the first is row {row}, character {at}: {excerpts} "
            "(pivot / source); set chat.template so that both keep the same text"
        )


def role_pairs(
    pivot: DistributionStore, source: DistributionStore, tokenizers: tuple[Any, Any]
) -> list[tuple[int, int]]:
    """(source id, pivot id) of special tokens with the same role: bos, eos, and the token that closes a turn."""
    theirs, own = (special_roles(t, _closing(s)) for t, s in zip(tokenizers, (pivot, source), strict=True))
    return [(own[role], theirs[role]) for role in ("bos", "eos", "end_of_turn") if role in own and role in theirs]


def _closing(store: DistributionStore) -> int | None:
    """The token that ends the turns of a store's first chats, if it is one of the special tokens recorded there."""
    last = Counter(int(_gold(store, i)[-1]) for i in range(min(len(store), 200)) if len(_gold(store, i)))
    special = set(store.manifest["special_ids"])
    return next((index for index, _ in last.most_common() if index in special), None)


def _gold(store: DistributionStore, row: int) -> Ints:
    ids, positions = store.row(row, "input_ids", "positions")
    return ids[positions.astype(np.int64) + 1].astype(np.int64)


def _ranked(source: Ragged, match: Ints) -> Ragged:
    """Distributions whose ids are ranks: all that the sorted-probability distance (ULD) needs."""
    starts = np.concatenate([[0], np.cumsum(source.counts)])
    spans = [np.arange(starts[j], starts[j + 1]) if j >= 0 else np.empty(0, np.int64) for j in match]
    take = np.concatenate([np.empty(0, np.int64), *spans]).astype(np.int64)
    ranks = np.concatenate([np.empty(0, np.int64), *(np.arange(len(s)) for s in spans)]).astype(np.int64)
    gold = np.where(match >= 0, source.gold_logprob[np.maximum(match, 0)] if len(source.counts) else 0.0, 0.0).astype(
        np.float32
    )
    return Ragged(np.array([len(s) for s in spans], np.int64), ranks, source.logprobs[take], gold)
