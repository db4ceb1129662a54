"""How many response tokens each model spoke for, by the chats' tag."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusechat.fusion.batches import FusionBatch
from fusechat.fusion.ranks import gathered

ALL = "all"  # the tag that sums all


class Wins:
    """Counts of this rank's chats since training began.

    names: of the models that take part. pivot_else: where nobody speaks, the pivot, the first of them, is counted: it
    learns from nobody there.
    """

    def __init__(self, names: Sequence[str], *, pivot_else: bool) -> None:
        self.names, self.pivot_else = names, pivot_else
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, batch: FusionBatch, part: Tensor) -> None:
        """part [N, S]: each model's in every position."""
        if self.pivot_else:
            part = torch.cat([1 - part[:, 1:].sum(1, keepdim=True), part[:, 1:]], 1)
        per_chat = part.new_zeros(len(batch.tags), part.shape[1]).index_add_(0, batch.sequence, part).tolist()
        for tag, shares in zip(batch.tags, per_chat, strict=True):
            for name, share in zip(self.names, shares, strict=True):
                self.counts[ALL, name] += share  # type: ignore[assignment]
                if tag:
                    self.counts[tag, name] += share  # type: ignore[assignment]

    def rates(self) -> dict[str, dict[str, float]]:
        """Tag -> model -> its share of the response tokens it spoke for. Every rank must ask."""
        counts = self._of_all_ranks()
        tags = sorted({tag for tag, _ in counts})
        totals = {tag: sum(counts[tag, name] for name in self.names) or 1 for tag in tags}
        return {tag: {name: counts[tag, name] / totals[tag] for name in self.names} for tag in tags}

    def state(self) -> list[list[Any]]:
        """For a checkpoint: tag, model and tokens of each count over all ranks; every rank must ask."""
        return [[tag, name, count] for (tag, name), count in self._of_all_ranks().items()]

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        """The inverse of `state`, for one rank: the others begin from nothing."""
        self.counts = Counter({(tag, name): count for tag, name, count in state})

    def _of_all_ranks(self) -> Counter[tuple[str, str]]:
        return sum(gathered(self.counts), Counter())
