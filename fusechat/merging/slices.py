"""One parameter of pivot and targets, in fp32, a slice at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fusechat.models.computed import Source, part_of, whole_of

SLICE = 1 << 17  # elements of one tensor at a time: half a MiB in fp32: pivot, targets and results stay in the cache
ON_DEVICE = 1 << 22  # the same on an accelerator, for whose memory a transfer should be larger
COMPILED = 1 << 21  # the same for compiled loops, which cut it into blocks of their own and share it among threads
Part = tuple[Tensor, list[Tensor]]
Seen = Callable[[int, Sequence[Tensor]], None]


class Slices:
    """Iterating yields flat slices (pivot, targets), anew each time. The tensors may be memory-mapped, of any float.

    device: where slices are moved to. seen: is called for every slice that is read, with its first element, and with
    pivot and targets as they are stored; what lies before it is not needed any more in this pass.
    """

    def __init__(
        self,
        pivot: Source,
        targets: Sequence[Source],
        device: torch.device | str = "cpu",
        seen: Seen | None = None,
    ) -> None:
        self.pivot, self.targets = pivot, list(targets)
        self.device, self.seen = torch.device(device), seen
        self.shape, self.size = pivot.shape, pivot.numel()

    def __iter__(self) -> Iterator[Part]:
        yield from self._floats(self.step)

    @property
    def step(self) -> int:
        """Elements of a slice."""
        return SLICE if self.device.type == "cpu" else ON_DEVICE

    @property
    def compiled(self) -> bool:
        """Whether methods may use the loops of `compiled`."""
        return self.device.type == "cpu"

    def rows(self) -> Iterator[Part]:
        """The same in whole rows, as matrices; a vector is one row."""
        width = self.shape[-1] if len(self.shape) > 1 else self.size
        for pivot, targets in self._floats(max(1, self.step // max(1, width)) * width):
            yield pivot.view(-1, width), [target.view(-1, width) for target in targets]

    def deltas(self) -> Iterator[list[Tensor]]:
        """The targets' differences from the pivot."""
        for pivot, targets in self:
            yield [target - pivot for target in targets]

    def of(self, j: int) -> Slices:
        """The same of one target alone, once a pass over all of them has been made."""
        return Slices(self.pivot, [self.targets[j]], self.device, self.seen)

    def whole(self) -> list[Tensor]:
        """Pivot and targets at once, for methods that need it: memory grows with the parameter."""
        tensors = [whole_of(source) for source in (self.pivot, *self.targets)]
        if self.seen:
            self.seen(0, [tensor.reshape(-1) for tensor in tensors])
        return [tensor.to(self.device).float() for tensor in tensors]

    def stored(self) -> Iterator[list[Tensor]]:
        """Flat slices of pivot and targets for compiled loops: all bfloat16 where all are stored so, else fp32."""
        for read in self._cut(COMPILED):
            same = all(tensor.dtype == torch.bfloat16 for tensor in read)
            yield [tensor.contiguous() if same else tensor.float() for tensor in read]

    def _floats(self, step: int) -> Iterator[Part]:
        for read in self._cut(step):
            pivot, *targets = [tensor.to(self.device).float() for tensor in read]
            yield pivot, targets

    def _cut(self, step: int) -> Iterator[list[Tensor]]:
        for start in range(0, max(1, self.size), max(1, step)):
            stop = min(start + step, self.size)
            read = [part_of(source, start, stop) for source in (self.pivot, *self.targets)]
            if self.seen:
                self.seen(start, read)
            yield read
