"""Matrices that are computed a few rows at a time instead of being read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Computed:
    """A matrix by its rows. rows: (first, last) -> [last − first, C] in fp32; None of it is kept."""

    shape: torch.Size
    rows: Callable[[int, int], Tensor]

    def numel(self) -> int:
        """R · C."""
        return self.shape.numel()

    def part(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened matrix."""
        width = max(1, self.shape[1])
        first = start // width
        return self.rows(first, -(-stop // width)).reshape(-1)[start - first * width : stop - first * width]

    def whole(self) -> Tensor:
        """All of it."""
        return self.rows(0, self.shape[0])


Source = Tensor | Computed


def low_rank(own: Tensor, left: Tensor, right: Tensor) -> Computed:
    """own + left · right, in fp32. left: [R, r]; right: [r, C]."""
    return Computed(own.shape, lambda first, last: torch.addmm(own[first:last].float(), left[first:last], right))


def part_of(source: Source, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a flattened tensor, in its own dtype."""
    return source.part(start, stop) if isinstance(source, Computed) else source.reshape(-1)[start:stop]


def whole_of(source: Source) -> Tensor:
    """A tensor, in its own dtype."""
    return source.whole() if isinstance(source, Computed) else source
