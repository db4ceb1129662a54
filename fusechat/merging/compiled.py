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
        left, out = _quotas(raws, chosen), np.empty(len(raws[0]), np.float32)
        _spread(lambda _, u, *unit: kernels.merge_ties(raws, *unit, chosen.thresholds, left[u], *options, out), raws)
        return torch.from_numpy(out)

    return map(merged, _raws(slices))


def energies(slices: Slices, chosen: Largest) -> Tensor:
    """Σ δ_j² over the chosen elements, [J]."""

    def of_slice(raws: Raws) -> Counts:
        left = _quotas(raws, chosen)
        found = np.zeros((len(left), len(slices.targets)))
        _spread(lambda _, u, *unit: kernels.add_energies(raws, *unit, chosen.thresholds, left[u], found[u]), raws)
        return found.sum(0)  # type: ignore[no-any-return]

    return torch.from_numpy(np.sum([of_slice(raws) for raws in _raws(slices)], 0))


def erased(slices: Slices, chosen: Largest, weights: Weights) -> Parts:
    """The last step of `sparse.sce`, added to the pivot. chosen: the elements of the deltas that count."""
    each = np.array(weights, np.float32)

    def merged(raws: Raws) -> Tensor:
        left, out = _quotas(raws, chosen), np.empty(len(raws[0]), np.float32)
        _spread(lambda _, u, *unit: kernels.merge_erased(raws, *unit, chosen.thresholds, left[u], each, out), raws)
        return torch.from_numpy(out)

    return map(merged, _raws(slices))


def _quotas(raws: Raws, chosen: Largest) -> Counts:
    """How many elements that equal the threshold each unit may take, [units, scores]."""
    equal = np.zeros((-(-len(raws[0]) // UNIT), len(chosen.left)), np.int64)
    if not chosen.left.any():
        return equal
    _spread(lambda _, u, *unit: kernels.count_equal(raws, chosen.variance, *unit, chosen.thresholds, equal[u]), raws)
    quotas = np.clip(chosen.left - (np.cumsum(equal, 0) - equal), 0, equal)
    chosen.left -= quotas.sum(0)
    return quotas  # type: ignore[no-any-return]


def _raws(slices: Slices) -> Iterator[Raws]:
    for read in slices.stored():
        bits = torch.int16 if read[0].dtype == torch.bfloat16 else torch.int32
        yield tuple(tensor.view(bits).numpy() for tensor in read)


def _spread(work: Callable[..., object], raws: Raws) -> None:
    """Calls ``work(thread, unit, first, last)`` for every unit of a slice."""
    size = len(raws[0])
    units = -(-size // UNIT)
    parts = max(1, min(threads.count(), units))
    bounds = [(u * UNIT, min(u * UNIT + UNIT, size)) for u in range(units)]
    threads.share(lambda part: [work(part, u, *bounds[u]) for u in range(part, units, parts)], parts)
