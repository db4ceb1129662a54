"""Chats of one shard in batches: what runs together, or comes back together from a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from fusechat.chats.render import Rendered
from fusechat.stores.distributions import TopK

Batch = tuple[list[int], list[TopK | None]]  # places in the shard, and the distributions of the chats there


class Predictor(Protocol):
    """A source that is ready."""

    def batches(self, rendered: Sequence[Rendered]) -> Iterator[Batch]:
        """Distributions of all chats of a shard at their response positions; None where one is not finite."""

    def noted(self) -> dict[str, Any]:
        """What there is to say of the shard that was made: statistics of it beside those of its rows."""


def by_token_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices by falling length, in groups whose padded size stays within ``budget`` tokens (at least one each)."""
    groups: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[groups[-1][0]] if groups[-1] else 0
        if groups[-1] and longest * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(index)
    return groups
