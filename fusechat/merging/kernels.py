"""The loops of `compiled`: over a unit of a slice, first .. last, block by block.

raws: pivot, then targets, as stored: the bits of bfloat16 (int16) or of fp32 (int32). left: how many elements that
equal the threshold may still be taken, in place.
"""

from __future__ import annotations

import numba
import numpy as np

BLOCK = 1 << 11  # elements
kernel = numba.njit(cache=True, nogil=True, error_model="numpy")


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
def count_scores(raws, variance, first, last, stride, low, floors, counts):  # type: ignore[no-untyped-def]
    """Adds a unit's scores to the histograms ``counts``, [scores, bins + 2]: above, and exactly zero, come last."""
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
def count_equal(raws, variance, first, last, thresholds, counts):  # type: ignore[no-untyped-def]
    """Adds how many of a unit's scores equal the thresholds, [scores]."""
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
def merge_ties(raws, first, last, thresholds, left, weights, scale, normalize, out):  # type: ignore[no-untyped-def]
    """TIES of a unit: elect the sign of the weighted sum, then average what agrees with it."""
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
def add_energies(raws, first, last, thresholds, left, energy):  # type: ignore[no-untyped-def]
    """Adds Σ δ_j² over a unit's chosen elements, [J], in as many lanes as a block has."""
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
def merge_erased(raws, first, last, thresholds, left, weights, out):  # type: ignore[no-untyped-def]
    """The last step of SCE over a unit: weights of the deltas whose sign is their sum's, renormalised."""
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
