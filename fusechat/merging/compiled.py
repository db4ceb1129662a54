"""TIES and SCE as compiled loops for the CPU: each pass reads pivot and targets once, and keeps its steps in the cache.

The formulas are those of `sparse`, which tests hold against these loops. A slice is cut into units whose bounds do not
depend on the number of threads, nor do the results; within a unit everything happens in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from fusechat.app import threads
from fusechat.merging.family import Parts, Weights
from fusechat.merging.selection import Counts, Largest
from fusechat.merging.slices import Slices

UNIT, BLOCK = 1 << 18, 1 << 11  # elements
Raws = tuple[np.ndarray[Any, Any], ...]  # pivot, then targets: the bits of bfloat16 (int16) or of fp32 (int32)
kernel = numba.njit(cache=True, nogil=True, error_model="numpy")


def histograms(slices: Slices, variance: bool, low: int, floors: Counts, bins: int, stride: int) -> Counts:
    """`selection.histograms`, of every ``stride``-th block."""
    counts = np.zeros((threads.count(), len(floors), bins + 2), np.int32)

    def count(raws: Raws) -> None:
        _spread(lambda part, _, *unit: _histogram(raws, variance, *unit, stride, low, floors, counts[part]), raws)

    for raws in _raws(slices):
        count(raws)
    return counts.sum(0) if len(counts) > 1 else counts[0]  # type: ignore[no-any-return]


def ties(slices: Slices, chosen: Largest, weights: Weights, scale: float, normalize: bool) -> Parts:
    """`sparse.ties`, given the largest elements of every delta."""
    options = (np.array(weights, np.float32), np.float32(scale), normalize)

    def merged(raws: Raws) -> Tensor:
        left, out = _quotas(raws, chosen), np.empty(len(raws[0]), np.float32)
        _spread(lambda _, u, *unit: _ties(raws, *unit, chosen.thresholds, left[u], *options, out), raws)
        return torch.from_numpy(out)

    return map(merged, _raws(slices))


def energies(slices: Slices, chosen: Largest) -> Tensor:
    """Σ δ_j² over the chosen elements, [J]."""

    def of_slice(raws: Raws) -> Counts:
        left = _quotas(raws, chosen)
        found = np.zeros((len(left), len(slices.targets)))
        _spread(lambda _, u, *unit: _energies(raws, *unit, chosen.thresholds, left[u], found[u]), raws)
        return found.sum(0)  # type: ignore[no-any-return]

    return torch.from_numpy(np.sum([of_slice(raws) for raws in _raws(slices)], 0))


def erased(slices: Slices, chosen: Largest, weights: Weights) -> Parts:
    """The last step of `sparse.sce`, added to the pivot. chosen: the elements of the deltas that count."""
    each = np.array(weights, np.float32)

    def merged(raws: Raws) -> Tensor:
        left, out = _quotas(raws, chosen), np.empty(len(raws[0]), np.float32)
        _spread(lambda _, u, *unit: _erased(raws, *unit, chosen.thresholds, left[u], each, out), raws)
        return torch.from_numpy(out)

    return map(merged, _raws(slices))


def _quotas(raws: Raws, chosen: Largest) -> Counts:
    """How many elements that equal the threshold each unit may take, [units, scores]."""
    equal = np.zeros((-(-len(raws[0]) // UNIT), len(chosen.left)), np.int64)
    if not chosen.left.any():
        return equal
    _spread(lambda _, u, *unit: _equal(raws, chosen.variance, *unit, chosen.thresholds, equal[u]), raws)
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


@kernel
def _load(raw, first, count, bits):  # type: ignore[no-untyped-def]
    """The fp32 bits of a block: bfloat16 is their upper half."""
    factor = np.int32(1 << 8 * (4 - raw.itemsize))
    part = raw[first : first + count]  # an index that cannot be negative makes vector instructions
    for i in range(len(part)):
        bits[i] = part[i] * factor


@kernel
def _buffers(raws):  # type: ignore[no-untyped-def]
    """Blocks of the pivot [1, BLOCK] and of the targets [J, BLOCK], as bits; their scores [J, BLOCK]."""
    shape = (len(raws) - 1, BLOCK)
    return np.empty((1, BLOCK), np.int32), np.empty(shape, np.int32), np.empty(shape, np.float32)


@kernel
def _prepare(raws, variance, first, count, pivot_bits, bits, scores):  # type: ignore[no-untyped-def]
    """A block's deltas in place of the targets, and its scores: the variance in the first row, or |δ_j|."""
    _load(raws[0], first, count, pivot_bits[0])
    pivot, deltas = pivot_bits.view(np.float32)[0], bits.view(np.float32)
    for j in range(len(bits)):
        _load(raws[j + 1], first, count, bits[j])
    if variance:
        _variances(deltas, count, scores[0])
    for j in range(len(bits)):
        delta, score = deltas[j], scores[j]
        for i in range(count):
            delta[i] -= pivot[i]
        if not variance:
            for i in range(count):
                score[i] = abs(delta[i])


@kernel
def _variances(targets, count, variances):  # type: ignore[no-untyped-def]
    """Of the targets, as `sparse.variances` has them."""
    share, base = np.float32(len(targets)), targets[0]
    mean = np.zeros(count, np.float32)
    variances[:count] = 0
    for j in range(1, len(targets)):
        target = targets[j]
        for i in range(count):
            apart = target[i] - base[i]
            mean[i] += apart
            variances[i] += apart * apart
    for i in range(count):
        found = variances[i] / share - (mean[i] / share) * (mean[i] / share)
        variances[i] = np.float32(0) if found < 0 else found


@kernel
def _histogram(raws, variance, first, last, stride, low, floors, counts):  # type: ignore[no-untyped-def]
    pivot, bits, scores = _buffers(raws)
    bins, places = np.int32(counts.shape[1] - 2), np.empty(BLOCK, np.int32)
    for start in range(first, last, BLOCK * stride):
        count = min(BLOCK, last - start)
        _prepare(raws, variance, start, count, pivot, bits, scores)
        for s in range(len(floors)):
            values, found, floor = scores.view(np.int32)[s], counts[s], np.int32(floors[s])
            above = zeros = np.int32(0)
            for i in range(count):
                places[i] = ((values[i] & 0x7FFFFFFF) >> low) - floor  # a NaN's sign must not lead out of the bins
                above += np.int32(places[i] >= bins)
                zeros += np.int32(values[i] == 0)
            for i in range(count):  # the one branch is seldom taken, or always
                if np.uint32(places[i]) < np.uint32(bins):
                    found[places[i]] += 1
            found[bins] += above
            found[bins + 1] += zeros


@kernel
def _equal(raws, variance, first, last, thresholds, counts):  # type: ignore[no-untyped-def]
    pivot, bits, scores = _buffers(raws)
    for start in range(first, last, BLOCK):
        count = min(BLOCK, last - start)
        _prepare(raws, variance, start, count, pivot, bits, scores)
        for s in range(len(thresholds)):
            values, threshold, found = scores[s], thresholds[s], np.int32(0)
            for i in range(count):
                found += np.int32(values[i] == threshold)
            counts[s] += found


@kernel
def _mask(values, count, threshold, left):  # type: ignore[no-untyped-def]
    """Turns a block's scores into 1 where an element is chosen, else 0; returns how many equal ones may follow."""
    equal = np.int32(0)
    if left > 0:
        for i in range(count):
            equal += np.int32(values[i] == threshold)
    if equal <= left:
        least = threshold if equal > 0 else np.nextafter(threshold, np.float32(np.inf))
        for i in range(count):
            values[i] = np.float32(1) if values[i] >= least else np.float32(0)
        return left - equal
    for i in range(count):
        taken = values[i] == threshold and left > 0
        left -= np.int64(taken)
        values[i] = np.float32(1) if taken or values[i] > threshold else np.float32(0)
    return left


@kernel
def _agree(values, count, total, factors, weights, merged, share):  # type: ignore[no-untyped-def]
    """Σ_j factor_j · value_j and Σ_j weight_j over the j whose sign is the total's; zero counts as positive."""
    merged[:], share[:] = 0, 0
    for j in range(len(weights)):
        value, factor, weight = values[j], factors[j], weights[j]
        for i in range(count):
            agrees = value[i] > 0 if total[i] >= 0 else value[i] < 0
            merged[i] += factor * value[i] if agrees else np.float32(0)
            share[i] += weight if agrees else np.float32(0)


@kernel
def _ties(raws, first, last, thresholds, left, weights, scale, normalize, out):  # type: ignore[no-untyped-def]
    pivot_bits, bits, scores = _buffers(raws)
    pivot, deltas = pivot_bits.view(np.float32)[0], bits.view(np.float32)
    total, share, ones = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.ones_like(weights)
    for start in range(first, last, BLOCK):
        count = min(BLOCK, last - start)
        _prepare(raws, False, start, count, pivot_bits, bits, scores)
        total[:] = 0
        for j in range(len(weights)):
            delta, mask, weight = deltas[j], scores[j], weights[j]
            left[j] = _mask(mask, count, thresholds[j], left[j])
            for i in range(count):
                delta[i] *= mask[i] * weight
                total[i] += delta[i]
        merged = out[start : start + count]
        _agree(deltas, count, total, ones, weights, merged, share)
        for i in range(count):
            divisor = share[i] if normalize and abs(share[i]) >= np.float32(1e-8) else np.float32(1)
            merged[i] = merged[i] / divisor * scale + pivot[i]


@kernel
def _energies(raws, first, last, thresholds, left, energy):  # type: ignore[no-untyped-def]
    pivot, bits, scores = _buffers(raws)
    deltas = bits.view(np.float32)
    sums = np.zeros(bits.shape, np.float32)
    for start in range(first, last, BLOCK):
        count = min(BLOCK, last - start)
        _prepare(raws, True, start, count, pivot, bits, scores)
        mask = scores[0]
        left[0] = _mask(mask, count, thresholds[0], left[0])
        for j in range(len(bits)):
            delta, lanes = deltas[j], sums[j]
            for i in range(count):
                lanes[i] += delta[i] * delta[i] * mask[i]
    for j in range(len(bits)):
        for i in range(BLOCK):
            energy[j] += sums[j, i]


@kernel
def _erased(raws, first, last, thresholds, left, weights, out):  # type: ignore[no-untyped-def]
    pivot_bits, bits, scores = _buffers(raws)
    pivot, deltas = pivot_bits.view(np.float32)[0], bits.view(np.float32)
    total, share = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for start in range(first, last, BLOCK):
        count = min(BLOCK, last - start)
        _prepare(raws, True, start, count, pivot_bits, bits, scores)
        mask = scores[0]
        left[0] = _mask(mask, count, thresholds[0], left[0])
        total[:] = 0
        for j in range(len(weights)):
            delta = deltas[j]
            for i in range(count):
                delta[i] *= mask[i]
                total[i] += delta[i]
        merged = out[start : start + count]
        _agree(deltas, count, total, weights, weights, merged, share)
        for i in range(count):
            merged[i] = merged[i] / max(share[i], np.float32(1e-30)) + pivot[i]
