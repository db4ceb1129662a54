"""Chats of one shard, rendered, in batches by token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fusechat.chats.render import ChatRenderer, Rendered

Batch = tuple[list[int], list[Rendered]]  # places in the shard, and what lies there


def batches(chats: Sequence[Any], renderer: ChatRenderer, budget: int) -> Iterator[Batch]:
    """All batches of a shard; nothing outside it decides them, so that it is the same whoever makes it.

    budget: padded tokens of a batch.
    """
    rendered = renderer([chat["messages"] for chat in chats])
    for places in by_token_budget([len(r.input_ids) for r in rendered], budget):
        yield places, [rendered[i] for i in places]


def by_token_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices by falling length, in groups whose padded size stays within ``budget`` tokens (at least one each)."""
    groups: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[groups[-1][0]] if groups[-1] else 0
        if groups[-1] and longest * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(index)
    return groups
