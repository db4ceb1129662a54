"""Chats of a store's shards, rendered and batched by token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fusechat.chats.render import ChatRenderer, Rendered
from fusechat.stores.store import StoreWriter


@dataclass
class Batch:
    """Chats of one shard run together. rows: their places in the shard; last: the shard ends with this batch."""

    shard: int
    rows: list[int]
    chats: list[dict[str, Any]]
    rendered: list[Rendered]
    last: bool


class ShardBatches:
    """Batches of the shards that are still to do. Batches never cross shards, so a resumed run is the same run.

    chats: a dataset of id, messages, tag. budget: padded tokens of a batch, for shards that have not begun.
    """

    def __init__(
        self, chats: Any, renderer: ChatRenderer, writer: StoreWriter, rows_per_shard: int, budget: int
    ) -> None:
        self.chats, self.renderer, self.writer = chats, renderer, writer
        self.rows_per_shard, self.budget = rows_per_shard, budget

    def of_rank(self, rank: int, world: int) -> Iterator[Batch]:
        """The batches of every world-th shard, from ``rank`` on."""
        for shard in range(rank, self.writer.total, world):
            if self.writer.done(shard) is None:
                yield from self._of_shard(shard)

    def halve(self) -> int:
        """The new budget, where memory has run out."""
        self.budget = max(1, self.budget // 2)
        return self.budget

    def _of_shard(self, shard: int) -> Iterator[Batch]:
        first = shard * self.rows_per_shard
        chats = self.chats.select(range(first, min(first + self.rows_per_shard, len(self.chats)))).to_list()
        rendered = self.renderer([chat["messages"] for chat in chats])
        groups = by_token_budget([len(r.input_ids) for r in rendered], self.budget)
        for number, rows in enumerate(groups):
            last = number + 1 == len(groups)
            yield Batch(shard, rows, [chats[i] for i in rows], [rendered[i] for i in rows], last)


def by_token_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices by falling length, in groups whose padded size stays within ``budget`` tokens (at least one each)."""
    groups: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[groups[-1][0]] if groups[-1] else 0
        if groups[-1] and longest * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(index)
    return groups
