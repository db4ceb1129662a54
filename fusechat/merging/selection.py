"""The largest elements of a tensor that is seen in slices: radix selection over the bits of non-negative floats."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numba
import numpy as np
import torch
from torch import Tensor

Scores = Callable[[], Iterable[Tensor]]
HIGH, LOW = 1 << 15, 1 << 16  # bins of the upper and the lower half of a float's bits, the sign left out


class Largest:
    """Which elements are among the largest of a stream of fp32 scores >= 0; among equal ones the first.

    scores: yields the stream's slices, anew each time it is called. count: how many; or share: of those above zero.
    Two passes find the threshold. Memory does not depend on the stream's length.
    """

    def __init__(self, scores: Scores, count: int | None = None, share: float = 1.0) -> None:
        upper = _histogram(scores, 16, 31, 0, HIGH)
        size, positive = int(upper.sum()), int(upper[1:].sum())
        count = int(share * positive) if count is None else count
        self.everything, self.nothing = count >= size, count <= 0
        self.threshold, self.ties = 0.0, 0
        if not (self.everything or self.nothing):
            above, high = _kth(upper, count)
            more, low = _kth(_histogram(scores, 0, 16, high, LOW), count - above)
            self.threshold = float(np.array([(high << 16) | low], np.int32).view(np.float32)[0])
            self.ties = count - above - more

    def masker(self) -> Callable[[Tensor], Tensor]:
        """A function that is called with each slice's scores, in the stream's order, and returns the slice's mask.

        Masks are fp32 of 0 and 1, which multiplies many times faster than bool.
        """
        left = self.ties

        def mask_of(scores: Tensor) -> Tensor:
            nonlocal left
            if self.everything or self.nothing:
                return torch.full((), float(self.everything))
            mask = torch.nn.functional.hardshrink(scores, self.threshold).sign_()  # 1 above the threshold
            if left > 0:
                equal = scores == self.threshold
                found = int(equal.sum())
                if found > left:
                    equal &= equal.flatten().cumsum(0).view_as(equal) <= left
                left -= min(found, left)
                mask.masked_fill_(equal, 1.0)
            return mask

        return mask_of


def _kth(histogram: np.ndarray[tuple[int], np.dtype[np.int64]], count: int) -> tuple[int, int]:
    """How many lie in the bins above the one that holds the count-th largest; and that bin."""
    from_top = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(from_top, count))
    return int(from_top[place] - histogram[::-1][place]), len(histogram) - 1 - place


def _histogram(
    scores: Scores, low: int, high: int, prefix: int, bins: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Counts of ``bits >> low`` among the scores whose ``bits >> high`` is ``prefix``."""
    counts = np.zeros(bins, np.int64)
    for part in scores():
        _count(part.flatten().view(torch.int32).numpy(), low, high, prefix, counts)
    return counts


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _count(bits, low, high, prefix, counts):  # type: ignore[no-untyped-def]
    for i in range(len(bits)):
        value = bits[i] & 0x7FFFFFFF  # a NaN's sign must not lead out of the bins
        if value >> high == prefix:
            counts[(value >> low) & (len(counts) - 1)] += 1
