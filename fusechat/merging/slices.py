"""One parameter of pivot and targets, in fp32, a slice at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from fusechat.merging.selection import Largest

SLICE = 1 << 19  # elements of one tensor in fp32 at a time: 2 MiB, so that pivot, targets and results stay in the cache
Part = tuple[Tensor, list[Tensor]]
Score = Callable[[Tensor, Sequence[Tensor]], Tensor]


class Slices:
    """Iterating yields flat slices (pivot, targets), anew each time. The tensors may be memory-mapped, of any float."""

    def __init__(self, pivot: Tensor, targets: Sequence[Tensor]) -> None:
        self.pivot, self.targets = pivot, list(targets)
        self.shape, self.size = pivot.shape, pivot.numel()

    def __iter__(self) -> Iterator[Part]:
        yield from self._cut(SLICE)

    def of(self, j: int) -> Slices:
        """The same of one target alone."""
        return Slices(self.pivot, [self.targets[j]])

    def rows(self) -> Iterator[Part]:
        """The same in whole rows, as matrices; a vector is one row."""
        width = self.shape[-1] if len(self.shape) > 1 else self.size
        for pivot, targets in self._cut(max(1, SLICE // max(1, width)) * width):
            yield pivot.view(-1, width), [target.view(-1, width) for target in targets]

    def deltas(self) -> Iterator[list[Tensor]]:
        """The targets' differences from the pivot."""
        for pivot, targets in self:
            yield [target - pivot for target in targets]

    def largest(self, score: Score, count: int | None = None, share: float = 1.0) -> Largest:
        """The elements of largest score, see `Largest`."""
        from fusechat.merging.selection import Largest  # here: numba takes longer to import than some merges

        return Largest(lambda: (score(pivot, targets) for pivot, targets in self), count, share)

    def whole(self) -> list[Tensor]:
        """Pivot and targets at once, for methods that need it."""
        return [tensor.float() for tensor in (self.pivot, *self.targets)]

    def _cut(self, step: int) -> Iterator[Part]:
        pivot, *targets = [tensor.reshape(-1) for tensor in (self.pivot, *self.targets)]
        for start in range(0, max(1, self.size), max(1, step)):
            part = slice(start, start + step)
            yield pivot[part].float(), [target[part].float() for target in targets]
