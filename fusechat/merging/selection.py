"""The largest elements of a parameter that is seen in slices: radix selection over the bits of non-negative floats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusechat.merging.slices import Slices

UPPER = 1 << 15  # bins of the upper half of a float's bits, the sign left out
STRIDE, SAMPLED = 16, 1 << 20  # of parameters with that many elements, one block in 16 is a sample
COARSE = 1 << 9  # bins that are searched together
EXACT, NEAR, WIDE = 1 << 16, 1 << 17, 1 << 19  # values around a guess, as bits, that are told apart
LARGE = 1 << 24  # elements beyond which a wide count costs less than a guess that missed
TRIES = 3  # guesses that are corrected
Counts = np.ndarray[Any, np.dtype[Any]]


class Largest:
    """Elements above a threshold, and the first ``left`` of those that equal it; for each of several scores.

    Slices are taken in order: what one of them used up is gone. variance: see `scores`.
    """

    def __init__(self, thresholds: Sequence[float], left: Sequence[int], variance: bool) -> None:
        self.thresholds, self.left = np.array(thresholds, np.float32), np.array(left, np.int64)
        self.variance = variance

    def anew(self) -> Largest:
        """The same for another pass; to be taken before the first."""
        return Largest(list(self.thresholds), list(self.left), self.variance)

    def masks(self, pivot: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        """The next slice's, one per score: 1 where an element is chosen, else 0."""
        return [self._mask(s, values) for s, values in enumerate(scores(pivot, targets, self.variance))]

    def _mask(self, s: int, values: Tensor) -> Tensor:
        threshold, left = float(self.thresholds[s]), int(self.left[s])
        mask = (values > threshold).float()
        if left > 0:
            equal = values == threshold
            found = int(equal.sum())
            if found > left:
                equal &= equal.cumsum(0) <= left
            self.left[s] -= min(found, left)
            mask.masked_fill_(equal, 1.0)
        return mask


def scores(pivot: Tensor, targets: Sequence[Tensor], variance: bool) -> list[Tensor]:
    """What elements are chosen by: the variance over the targets, or |δ_j| of each target."""
    return [variances(targets)] if variance else [(target - pivot).abs_() for target in targets]


def variances(targets: Sequence[Tensor]) -> Tensor:
    """Of the targets, element by element; taken from the first, so that equal targets give exactly zero."""
    first, second = torch.zeros_like(targets[0]), torch.zeros_like(targets[0])
    for target in targets[1:]:
        apart = target - targets[0]
        first.add_(apart)
        second.addcmul_(apart, apart)
    return second.div_(len(targets)).sub_(first.div_(len(targets)).square_()).clamp_min_(0.0)


def largest_deltas(slices: Slices, counts: Sequence[int]) -> Largest:
    """The elements of largest |δ_j|, ``counts[j]`` of target j; among equal ones the first."""
    return _largest(slices, False, lambda positive: counts)


def most_varying(slices: Slices, share: float) -> Largest:
    """The elements of largest variance over the targets, this share of those that vary at all."""
    return _largest(slices, True, lambda positive: [int(share * count) for count in positive])


def everything() -> Largest:
    """Every element, in the form of `most_varying`."""
    return Largest([-1.0], [0], True)


def _largest(slices: Slices, variance: bool, wanted: Callable[[list[int]], Sequence[int]]) -> Largest:
    """wanted: how many of each score, given how many of each are above zero.

    Where a threshold is not where a sample says, time and again, the sample becomes all there is.
    """
    found = None
    if slices.compiled and slices.size >= SAMPLED:
        found = _guessed(slices, variance, wanted, STRIDE)
    thresholds, left = zip(*(found or _guessed(slices, variance, wanted, 1) or ()), strict=True)
    return Largest(thresholds, left, variance)


def _guessed(
    slices: Slices, variance: bool, wanted: Callable[[list[int]], Sequence[int]], stride: int
) -> list[tuple[float, int]] | None:
    """`_threshold` of every score; None where some are not found.

    The upper halves of a sample's bits say near which value a threshold lies; a pass over everything counts what is
    above and, exactly, what is near. That corrects the guess where it missed, for these scores alone.
    """
    amount = 1 if variance else len(slices.targets)
    near_by = EXACT if stride == 1 else NEAR if slices.size < LARGE else WIDE
    sample = histograms(slices, variance, 16, np.zeros(amount, np.int64), UPPER, stride)
    size = sample[:, :-1].sum(1)
    guess = wanted([int(n * (slices.size / s)) for n, s in zip(size - sample[:, -1], size, strict=True)])
    ranks = [min(int(s), int(rank * s / slices.size)) for rank, s in zip(guess, size, strict=True)]
    floors = [_floor(one, rank, near_by) for one, rank in zip(sample, ranks, strict=True)]
    near = histograms(slices, variance, 0, np.array(floors), near_by, 1)
    counts = wanted([slices.size - int(zeros) for zeros in near[:, -1]])
    found = []
    for s, (counted, floor, count) in enumerate(zip(near, floors, counts, strict=True)):
        threshold, again = _threshold(counted, floor, count, slices.size), TRIES
        while threshold is None and again:
            rank = _corrected(sample[s, :-2], counted, floor, count, slices.size / int(size[s]))
            floor, again = _floor(sample[s], rank, near_by), again - 1
            alone = slices if variance else slices.of(s)
            (counted,) = histograms(alone, variance, 0, np.array([floor]), near_by, 1)
            threshold = _threshold(counted, floor, count, slices.size)
        if threshold is None:
            return None
        found.append(threshold)
    return found


def _floor(sample: Counts, rank: int, near_by: int) -> int:
    """Where, as bits, to begin to count ``near_by`` values around the sample's rank-th largest."""
    middle = _kth(sample[:-2], _coarse(sample), rank)[1]
    return max(0, (middle << 16) + (1 << 15) - near_by // 2)


def _corrected(sample: Counts, near: Counts, floor: int, count: int, ratio: float) -> int:
    """The rank in the sample of the count-th largest, told from the edge of what was counted that lies nearer to it.

    ratio: how many elements one of the sample stands for.
    """
    above, inside = int(near[-2]), int(near[:-2].sum())
    below = count > above
    edge, exact = (floor, above + inside) if below else (floor + len(near) - 2, above)
    beyond = int(sample[-(-edge >> 16) :].sum())
    rank = beyond + int((count - exact) / ratio) + (1 if below else 0)
    return max(1, min(rank, int(sample.sum())))


def _threshold(near: Counts, floor: int, count: int, size: int) -> tuple[float, int] | None:
    """The count-th largest score and how many that equal it are chosen; None where it is not among those counted."""
    if count <= 0 or count >= size:
        return (float("inf"), 0) if count <= 0 else (-1.0, 0)
    above, coarse = int(near[-2]), _coarse(near)
    if not above < count <= above + int(coarse.sum()):
        return None
    more, place = _kth(near[:-2], coarse, count - above)
    return float(np.array([floor + place], np.int32).view(np.float32)[0]), count - above - more


def _coarse(counts: Counts) -> Counts:
    """The bins of `histograms`' counts, ``COARSE`` of them together; in their dtype, which spares a copy."""
    return counts[:-2].reshape(-1, COARSE).sum(1, dtype=counts.dtype)  # type: ignore[no-any-return]


def _kth(histogram: Counts, coarse: Counts, count: int) -> tuple[int, int]:
    """How many lie in the bins above the one that holds the count-th largest; and that bin."""
    above, place = _from_top(coarse, count)
    more, fine = _from_top(histogram[place * COARSE : (place + 1) * COARSE], count - above)
    return above + more, place * COARSE + fine


def _from_top(counts: Counts, count: int) -> tuple[int, int]:
    from_top = np.cumsum(counts[::-1], dtype=np.int64)
    place = int(np.searchsorted(from_top, count))
    return int(from_top[place] - counts[::-1][place]), len(counts) - 1 - place


def histograms(slices: Slices, variance: bool, low: int, floors: Counts, bins: int, stride: int) -> Counts:
    """Counts [scores, bins + 2] of ``(bits >> low) - floor``; the last two: how many lie above the bins, and are zero.

    stride: one block in so many is counted, where the loops are compiled.
    """
    if slices.compiled:
        from fusechat.merging import compiled  # here: numba takes longer to import than some merges

        return compiled.histograms(slices, variance, low, floors, bins, stride)
    counts = np.zeros((len(floors), bins + 2), np.int64)
    for pivot, targets in slices:
        for s, values in enumerate(scores(pivot, targets, variance)):
            place = ((values.view(torch.int32) & 0x7FFFFFFF) >> low) - int(floors[s])
            found = torch.bincount(place[place >= 0].clamp_max_(bins), minlength=bins + 1)
            counts[s, :-1] += found.cpu().numpy()
            counts[s, -1] += int((values == 0).sum())
    return counts
