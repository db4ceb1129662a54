"""TIES and SCE as compiled loops for the CPU: each pass reads pivot and targets once, and keeps its steps in the cache.

The formulas are those of `sparse`, which tests hold against these loops. A slice is cut into units whose bounds do not
depend on the number of threads, nor do the results; within a unit everything happens in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusechat.app import threads
from fusechat.merging import kernels
from fusechat.merging.family import Parts, Weights
from fusechat.merging.selection import Counts, Largest
from fusechat.merging.slices import Slices

UNIT = 1 << 18  # elements
Raws = tuple[np.ndarray[Any, Any], ...]  # pivot, then targets: the bits of bfloat16 (int16) or of fp32 (int32)


def histograms(slices: Slices, variance: bool, low: int, floors: Counts, bins: int, stride: int) -> Counts:
    """`selection.histograms`, of every ``stride``-th block."""
    counts = np.zeros((threads.count(), len(floors), bins + 2), np.int32)

    def count(raws: Raws) -> None:
        _spread(
            lambda part, _, *unit: kernels.count_scores(raws, variance, *unit, stride, low, floors, counts[part]), raws
        )

    for raws in _raws(slices):
        count(raws)
    return counts.sum(0) if len(counts) > 1 else counts[0]  # type: ignore[no-any-return]


def ties(slices: Slices, chosen: Largest, weights: Weights, scale: float, normalize: bool) -> Parts:
    """`sparse.ties`, given the largest elements of every delta."""
    options = (np.array(weights, np.float32), np.float32(scale), normalize)

    def merged(raws: Raws) -> Tensor:
        out = np.empty(len(raws[0]), np.float32)
        _choose(
            lambda left, _, *unit: kernels.merge_ties(raws, *unit, chosen.thresholds, left, *options, out), raws, chosen
        )
        return torch.from_numpy(out)

    return map(merged, _raws(slices))


def energies(slices: Slices, chosen: Largest) -> Tensor:
    """Σ δ_j² over the chosen elements, [J]."""

    def of_slice(raws: Raws) -> Counts:
        found = np.zeros((len(_units(raws)), len(slices.targets)))
        _choose(
            lambda left, u, *unit: kernels.add_energies(raws, *unit, chosen.thresholds, left, found[u]), raws, chosen
        )
        return found.sum(0)  # type: ignore[no-any-return]

    return torch.from_numpy(np.sum([of_slice(raws) for raws in _raws(slices)], 0))


def erased(slices: Slices, chosen: Largest, weights: Weights) -> Parts:
    """The last step of `sparse.sce`, added to the pivot. chosen: the elements of the deltas that count."""
    each = np.array(weights, np.float32)

    def merged(raws: Raws) -> Tensor:
        out = np.empty(len(raws[0]), np.float32)
        _choose(
            lambda left, _, *unit: kernels.merge_erased(raws, *unit, chosen.thresholds, left, each, out), raws, chosen
        )
        return torch.from_numpy(out)

    return map(merged, _raws(slices))


def _choose(work: Callable[..., object], raws: Raws, chosen: Largest) -> None:
    """Calls ``work(left, unit, first, last)`` for every unit; left: how many that equal the threshold it may take.

    Work takes them off. Each thread goes through its units in order; what those of the earlier threads will take is
    counted beforehand.
    """
    parts = _parts(raws)
    equal = np.zeros((parts, len(chosen.left)), np.int64)
    if parts > 1 and chosen.left.any():
        of = (raws, chosen.variance)
        _spread(lambda p, _, *unit: kernels.count_equal(*of, *unit, chosen.thresholds, equal[p]), raws, but_last=True)
    left = np.maximum(chosen.left - (np.cumsum(equal, 0) - equal), 0)
    _spread(lambda part, u, *unit: work(left[part], u, *unit), raws)
    chosen.left[:] = left[-1]


def _raws(slices: Slices) -> Iterator[Raws]:
    for read in slices.stored():
        bits = torch.int16 if read[0].dtype == torch.bfloat16 else torch.int32
        yield tuple(tensor.view(bits).numpy() for tensor in read)


def _units(raws: Raws) -> list[tuple[int, int]]:
    """First and last element of each unit of a slice."""
    size = len(raws[0])
    return [(first, min(first + UNIT, size)) for first in range(0, size, UNIT)]


def _parts(raws: Raws) -> int:
    """How many threads share a slice."""
    return max(1, min(threads.count(), len(_units(raws))))


def _spread(work: Callable[..., object], raws: Raws, but_last: bool = False) -> None:
    """Calls ``work(thread, unit, first, last)`` for every unit of a slice; but_last: not for the last thread's."""
    units, parts = _units(raws), _parts(raws)

    def of(part: int) -> None:
        for u in range(len(units) * part // parts, len(units) * (part + 1) // parts):
            work(part, u, *units[u])

    threads.share(of, parts - but_last)
