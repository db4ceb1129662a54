"""Positions taken together: slices whose logits are held at a time, and chunks of text, which no slice tears."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import torch
from torch import Tensor

from fusechat.models.heads import chunk_rows

CHUNK_ELEMENTS = 1 << 22  # logits held at a time on a CPU: 16 MiB, for its caches


def over_chunks(x: Tensor, chunk: Tensor) -> Tensor:
    """Each row's sum over its chunk, [n, 1]; the operator is its own transpose, and so carries gradients back."""
    of = torch.cat([chunk.new_zeros(1), (chunk.diff() != 0).cumsum(0)])
    return x.new_zeros(len(x), 1).index_add_(0, of, x)[of]


def slices(held: Tensor, vocabulary: int, chunk: Tensor | None) -> Iterator[slice]:
    """Slices of the first dimension of ``held``, whose logits are computed together: whole chunks, where there are."""
    rows, start, size = chunk_rows(held.device, vocabulary, CHUNK_ELEMENTS), 0, len(held)
    cuts = range(size + 1) if chunk is None else [0, *((chunk.diff() != 0).nonzero().flatten() + 1).tolist(), size]
    while start < size:
        next_ = bisect_right(cuts, start)
        end = cuts[max(next_, bisect_right(cuts, start + rows) - 1)]
        yield slice(start, end)
        start = end
