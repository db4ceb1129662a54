"""One source aligned with the pivot, chat by chat and shard by shard, in as many processes as asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from fusechat.align import paths
from fusechat.align.chain import follow
from fusechat.align.maps import PairCounts
from fusechat.align.nearest import Ints
from fusechat.align.projection import Ragged, gold_path, project, ranked, with_ranks
from fusechat.align.sequence import SEQUENCES, Kinds, unmatched
from fusechat.app.errors import UserError
from fusechat.app.progress import progress
from fusechat.app.registry import import_modules
from fusechat.stores import common
from fusechat.stores.encoding import Array, decode_logprobs, encode_counts, encode_logprobs, narrowest
from fusechat.stores.kinds import INSIDE, KINDS, NONE
from fusechat.stores.store import DistributionStore
from fusechat.stores.writer import StoreWriter, list_column

Result = TypeVar("Result")


@dataclass
class Alignment:
    """How one source is aligned with the pivot; picklable, so that processes share it.

    sequence: a name of `SEQUENCES`. unmatched: gold or skip. chained: whether gold tokens take the chain rule.
    logprobs: how they are stored. table: source id -> pivot id, None where ids are to be ranks. texts: the tokens'
    texts by id, (pivot, source), and words: both vocabularies, where the sequence alignment needs them. drawn: the
    source's entries are samples. common [vocab_size]: the pivot's tokens that the source has, where what the pivot
    lacks is kept by rank: source tokens without a partner have ids beyond the pivot's in the table then.
    """

    pivot: DistributionStore
    source: DistributionStore
    sequence: str
    unmatched: str
    chained: bool
    logprobs: str
    table: Ints | None = None
    texts: tuple[list[str], list[str]] | None = None
    words: paths.Lexicon | None = None
    drawn: bool = False
    common: Array | None = None

    @property
    def vocab_size(self) -> int:
        """The pivot's."""
        return int(self.pivot.manifest["vocab_size"])

    def match(self, row: int) -> tuple[Ints, Kinds]:
        """match and kind of one chat, see `fusechat.align.sequence`."""
        align = SEQUENCES[self.sequence].function
        if self.words is not None:
            pivot, source = self._paths(row, self.words)
            match, kind = align(pivot.places, source.places)
            inside = kind == INSIDE
            lost = inside & ~paths.cut(match, pivot, source, self.words.texts)
            match[lost], kind[lost] = -1, NONE
            return match, kind
        theirs, own = self._boundaries(row)
        if self.texts is None:
            match, kind = align(theirs, own)
            return match, kind
        match, kind = unmatched(len(theirs))
        pivot_texts, source_texts = self.texts
        turns = zip(_turns(self.pivot, row), _turns(self.source, row), strict=False)
        for (begin, pivot_ids), (source_begin, source_ids) in turns if len(own) else ():
            turn = slice(begin, begin + len(pivot_ids))
            found, kind[turn] = align([pivot_texts[i] for i in pivot_ids], [source_texts[i] for i in source_ids])
            match[turn] = np.where(found >= 0, found + source_begin, -1)
        return match, kind

    def pair_counts(self, shard: int) -> PairCounts:
        """How often each source token is aligned with each pivot token in one shard."""
        size, pairs = self.vocab_size, [np.empty(0, np.int64)]
        for row in range(*self.source.ranges[shard]):
            match, kind = self.match(row)
            matched = (match >= 0) & (kind != INSIDE)
            pairs.append(self.source.gold(row)[match[matched]] * size + self.pivot.gold(row)[matched])
        pair, counts = np.unique(np.concatenate(pairs), return_counts=True)
        return PairCounts(pair // size, pair % size, counts)

    def shard(self, shard: int) -> tuple[pa.Table, dict[str, Any]]:
        """One shard of the source, aligned and projected, with its statistics."""
        span = range(*self.source.ranges[shard])
        rows, places = [self.row(row) for row in span], [self._places(row) for row in span]
        results, kinds = [result for result, _ in rows], [kind for _, kind in rows]
        logprobs = [encode_logprobs(result.logprobs, self.logprobs) for result in results]
        ranks = 0 if self.common is None or self.table is None else len(self.table)
        lists = {
            "counts": list_column([encode_counts(result.counts) for result in results], np.uint16),
            "ids": list_column([result.ids for result in results], narrowest(self.vocab_size + ranks - 1)),
            "logprobs": list_column(logprobs, np.dtype(self.logprobs)),
            "gold_logprob": list_column([result.gold_logprob for result in results], np.float16),
            "kind": list_column(kinds, np.uint8),
            "spent": list_column([self._spent(row, *pair) for row, pair in zip(span, places, strict=True)], np.float16),
        }
        scalars = {name: self.source.arrow(name, span.start, span.stop) for name in ("id", "nats", "bytes", "tokens")}
        same = [common.same_range(*pair) for pair in places]
        return pa.table({**scalars, "same_range": same, **lists}), _statistics(rows)

    def row(self, row: int) -> tuple[Ragged, Kinds]:
        """One chat: the source's distributions at the pivot's positions, and how each found its partner."""
        match, kind = self.match(row)
        counts, ids, logprobs, gold_logprob = self.source.row(row, "counts", "ids", "logprobs", "gold_logprob")
        source = Ragged(counts.astype(np.int64), ids, decode_logprobs(logprobs), gold_logprob.astype(np.float32))
        if self.table is None or self.common is not None:  # ranks are of whole tokens
            match, kind = np.where(kind == INSIDE, -1, match), np.where(kind == INSIDE, NONE, kind).astype(np.uint8)
        if self.table is None:
            return ranked(source, match), kind
        if len(ids) and int(ids.max()) >= len(self.table):
            raise UserError(
                f"{self.source.path}, row {row}: token id {int(ids.max())} is beyond the tokenizer's {len(self.table)} "
                "tokens; give the tokenizer that the store was extracted with (source.path)"
            )
        more = self.vocab_size, self.unmatched == "gold", self.drawn
        if self.words is not None and self.common is None:
            pivot, own = self._paths(row, self.words)
            return follow(source, match, pivot, own, self.table, self.words, *more), kind
        chain = np.full((len(match), 3), -1, np.int64)
        if self.chained:
            chain = gold_path(*self._places(row), match, self.source.gold(row))
        result = project(source, match, self.table, self.pivot.gold(row), chain, *more)
        return (result if self.common is None else with_ranks(result, self.vocab_size)), kind

    def _boundaries(self, row: int) -> tuple[Ints, Ints]:
        (theirs,), (own,) = self.pivot.row(row, "boundaries"), self.source.row(row, "boundaries")
        return theirs, own

    def _places(self, row: int) -> tuple[Ints, Ints]:
        return common.places(self.pivot, row), common.places(self.source, row)

    def _paths(self, row: int, words: paths.Lexicon) -> tuple[paths.Path, paths.Path]:
        pivot, source = self._places(row)
        of = paths.path(self.pivot.gold(row), pivot, words.pivot_texts)
        return of, paths.path(self.source.gold(row), source, words.texts)

    def _spent(self, row: int, pivot: Ints, source: Ints) -> Array:
        return common.spent(pivot, source, self.source.row(row, "gold_logprob")[0])


def write_aligned(alignment: Alignment, writer: StoreWriter, num_proc: int = 1, modules: Sequence[str] = ()) -> None:
    """Writes the shards that are not there yet; the result does not depend on ``num_proc``."""
    todo = [index for index in range(writer.total) if writer.done(index) is None]
    made = each_shard(alignment, Alignment.shard, todo, num_proc, modules)
    chats = [stop - start for start, stop in alignment.source.ranges]
    with progress("align", sum(chats), "chats", sum(chats) - sum(chats[index] for index in todo)) as tell:
        for index, (table, statistics) in zip(todo, made, strict=True):
            writer.write(index, table, statistics)
            tell(chats[index])


def corpus_counts(alignment: Alignment, num_proc: int = 1, modules: Sequence[str] = ()) -> PairCounts:
    """`Alignment.pair_counts` of all shards, added up."""
    shards, size = range(len(alignment.source.ranges)), alignment.vocab_size
    parts = []
    with progress("count token pairs", len(shards), "shards") as tell:
        for part in each_shard(alignment, Alignment.pair_counts, shards, num_proc, modules):
            parts.append(part)
            tell()
    source, pivot, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    pairs, inverse = np.unique(source * size + pivot, return_inverse=True)
    return PairCounts(pairs // size, pairs % size, np.bincount(inverse, weights=counts).astype(np.int64))


def each_shard(
    alignment: Alignment,
    work: Callable[[Alignment, int], Result],
    shards: Sequence[int],
    num_proc: int = 1,
    modules: Sequence[str] = (),
) -> Iterator[Result]:
    """``work(alignment, shard)`` for every shard, in order. modules: the user's own, which a new process imports."""
    if num_proc == 1:
        yield from (work(alignment, shard) for shard in shards)
        return
    with ProcessPoolExecutor(num_proc, initializer=import_modules, initargs=(tuple(modules),)) as pool:
        yield from pool.map(work, repeat(alignment), shards)


def _turns(store: DistributionStore, row: int) -> list[tuple[int, Ints]]:
    """The responses of one chat: where each begins among the chat's positions, and its tokens."""
    (positions,) = store.row(row, "positions")
    cuts = np.flatnonzero(np.diff(positions.astype(np.int64)) != 1) + 1
    return [*zip([0, *cuts.tolist()], np.split(store.gold(row), cuts), strict=True)]


def _statistics(rows: Sequence[tuple[Ragged, Kinds]]) -> dict[str, Any]:
    """Positions of each kind, the mass kept, and the gold tokens' nats where there is a partner."""
    seen: Counter[str] = Counter()
    for result, kind in rows:
        kept = np.exp(result.logprobs).sum() if len(result.ids) else 0.0
        seen.update({name: int((kind == number).sum()) for number, name in enumerate(KINDS)} | {"mass": float(kept)})
        seen["matched_nats"] += float(-result.gold_logprob[kind != NONE].sum())  # type: ignore[assignment]
        seen["positions_with_mass"] += int((result.counts > 0).sum())
    return dict(seen)
