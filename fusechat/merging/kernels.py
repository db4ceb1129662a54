"""The loops of `compiled`: over a part of a slice, first .. last, block by block.

raws: pivot, then targets, as stored: the bits of bfloat16 (int16) or of fp32 (int32). left: how many elements that
equal the threshold may still be taken, in place. numba widens int32 arithmetic to 64 bits, which halves what an
instruction does: hence the casts.
"""

from __future__ import annotations

import numba
import numpy as np

BLOCK = 1 << 9  # elements: what is computed of a block stays in the L1 cache
LANES = 1 << 11  # sums in fp32 that run beside each other; a sample is of as many elements in a row
GROUP = 1 << 5  # elements that are passed over together where none is near
kernel = numba.njit(cache=True, nogil=True, error_model="numpy")


@kernel
def _load(raw, first, count, bits):  # type: ignore[no-untyped-def]
    """The fp32 bits of a block: bfloat16 is their upper half."""
    shift = np.int32(8 * (4 - raw.itemsize))
    part = raw[first : first + count]  # an index that cannot be negative makes vector instructions
    for i in range(len(part)):
        bits[i] = np.int32(part[i]) << shift


@kernel
def _subtract(raw, first, count, pivot, delta):  # type: ignore[no-untyped-def]
    """A block's difference from the pivot."""
    shift = np.int32(8 * (4 - raw.itemsize))
    part = raw[first : first + count]
    for i in range(len(part)):
        delta[i] = np.int32(np.int32(part[i]) << shift).view(np.float32) - pivot[i]


@kernel
def _variances(raws, first, count, base, other, mean, variances):  # type: ignore[no-untyped-def]
    """Of the targets, as `sparse.variances` has them. base, other, mean: room for a block each."""
    share, bits = np.float32(len(raws) - 1), base.view(np.int32)
    _load(raws[1], first, count, bits)
    mean[:], variances[:] = 0, 0
    for j in range(2, len(raws)):
        _subtract(raws[j], first, count, base, other)
        for i in range(count):
            mean[i] += other[i]
            variances[i] += other[i] * other[i]
    for i in range(count):
        found = variances[i] / share - (mean[i] / share) * (mean[i] / share)
        variances[i] = np.float32(0) if found < 0 else found


@kernel
def _scores(raws, variance, first, count, rooms, scores):  # type: ignore[no-untyped-def]
    """A block's variances in the first row of ``scores``, or δ_j in row j. rooms: [3, BLOCK]."""
    if variance:
        _variances(raws, first, count, rooms[0], rooms[1], rooms[2], scores[0])
        return
    _load(raws[0], first, count, rooms.view(np.int32)[0])
    for j in range(len(scores)):
        _subtract(raws[j + 1], first, count, rooms[0], scores[j])


@kernel
def _rooms(raws):  # type: ignore[no-untyped-def]
    """Room for three blocks, and for one of each target."""
    return np.empty((3, BLOCK), np.float32), np.empty((len(raws) - 1, BLOCK), np.float32)


@kernel
def count_scores(raws, variance, first, last, stride, low, floors, counts):  # type: ignore[no-untyped-def]
    """Adds scores to the histograms ``counts``, [scores, bins + 2]: above, and exactly zero, come last."""
    rooms, scores = _rooms(raws)
    places = np.empty(BLOCK, np.int32)
    for start in range(first, last, BLOCK):
        if (start - first) // LANES % stride:
            continue
        count = min(BLOCK, last - start)
        _scores(raws, variance, start, count, rooms, scores)
        for s in range(len(floors)):
            _tally(scores.view(np.int32)[s, :count], np.int32(low), np.int32(floors[s]), places[:count], counts[s])


@kernel
def _tally(values, low, floor, places, found):  # type: ignore[no-untyped-def]
    """Adds a block's scores, the sign of their bits left out, to one histogram.

    Differences of bfloat16 mostly have an empty lower half: the one such value in the middle is counted apart.
    """
    bins = np.int32(len(found) - 2)
    middle = np.int32((((floor + bins // 2) >> 16) << 16) - floor)
    above = zeros = often = np.int32(0)
    for i in range(len(values)):
        value = np.int32(values[i] & np.int32(0x7FFFFFFF))
        place = np.int32(np.int32(value >> low) - floor)  # a NaN's sign must not lead out of the bins
        above = np.int32(above + (place >= bins))
        zeros = np.int32(zeros + (value == 0))
        often = np.int32(often + (place == middle))
        places[i] = bins if place == middle else place
    found[bins] += above
    found[bins + 1] += zeros
    if often:
        found[middle] += often
    for start in range(0, len(places), GROUP):
        group = places[start : start + GROUP]
        near = np.int32(0)
        for i in range(len(group)):
            near = np.int32(near | (np.uint32(group[i]) < np.uint32(bins)))
        if near:
            for i in range(len(group)):
                if np.uint32(group[i]) < np.uint32(bins):
                    found[group[i]] += 1


@kernel
def _equal(values, threshold):  # type: ignore[no-untyped-def]
    """How many of a block's scores equal the threshold."""
    found = np.int32(0)
    for i in range(len(values)):
        found = np.int32(found + (abs(values[i]) == threshold))
    return found


@kernel
def count_equal(raws, variance, first, last, thresholds, counts):  # type: ignore[no-untyped-def]
    """Adds how many scores equal the thresholds, [scores]."""
    rooms, scores = _rooms(raws)
    for start in range(first, last, BLOCK):
        count = min(BLOCK, last - start)
        _scores(raws, variance, start, count, rooms, scores)
        for s in range(len(thresholds)):
            counts[s] += _equal(scores[s, :count], thresholds[s])


@kernel
def _least(values, threshold, left, s):  # type: ignore[no-untyped-def]
    """From where on a block's scores are chosen; those that equal the threshold and are too many become zero."""
    equal = _equal(values, threshold) if left[s] > 0 else np.int32(0)
    if equal > left[s]:
        for i in range(len(values)):
            if abs(values[i]) == threshold:
                values[i] = values[i] if left[s] > 0 else np.float32(0)
                left[s] -= 1
        left[s] = 0
        return threshold
    left[s] -= equal
    return threshold if equal > 0 else np.nextafter(threshold, np.float32(np.inf))


@kernel
def _agree(value, total, factor, weight, merged, share):  # type: ignore[no-untyped-def]
    """Adds factor · value and the weight where the value's sign is the total's; zero counts as positive."""
    for i in range(len(merged)):
        agrees = value[i] > 0 if total[i] >= 0 else value[i] < 0
        merged[i] += factor * value[i] if agrees else np.float32(0)
        share[i] += weight if agrees else np.float32(0)


@kernel
def merge_ties(raws, first, last, thresholds, left, weights, scale, normalize, out):  # type: ignore[no-untyped-def]
    """TIES: elect the sign of the weighted sum, then average what agrees with it."""
    rooms, deltas = _rooms(raws)
    pivot, total, share = rooms
    for start in range(first, last, BLOCK):
        count = min(BLOCK, last - start)
        _scores(raws, False, start, count, rooms, deltas)
        total[:], share[:] = 0, 0
        for j in range(len(weights)):
            delta, weight = deltas[j], weights[j]
            least = _least(delta[:count], thresholds[j], left, j)
            for i in range(count):
                delta[i] *= weight if abs(delta[i]) >= least else np.float32(0)
                total[i] += delta[i]
        merged = out[start : start + count]
        merged[:] = 0
        for j in range(len(weights)):
            _agree(deltas[j], total, np.float32(1), weights[j], merged, share)
        for i in range(count):
            divisor = share[i] if normalize and abs(share[i]) >= np.float32(1e-8) else np.float32(1)
            merged[i] = merged[i] / divisor * scale + pivot[i]


@kernel
def _choose(raws, first, count, threshold, left, rooms, deltas, mask):  # type: ignore[no-untyped-def]
    """A block's deltas, and 1 where its variance is chosen, else 0; what lies below zero as threshold chooses all."""
    if threshold < 0:
        mask[:] = 1
    else:
        _variances(raws, first, count, rooms[0], rooms[1], rooms[2], mask)
        least = _least(mask[:count], threshold, left, 0)
        for i in range(count):
            mask[i] = np.float32(1) if mask[i] >= least else np.float32(0)
    _scores(raws, False, first, count, rooms, deltas)


@kernel
def add_energies(raws, first, last, thresholds, left, energy):  # type: ignore[no-untyped-def]
    """Adds Σ δ_j² over a unit's chosen elements, [J], in lanes."""
    rooms, deltas = _rooms(raws)
    mask, sums = np.empty(BLOCK, np.float32), np.zeros((len(raws) - 1, LANES), np.float32)
    for start in range(first, last, BLOCK):
        count = min(BLOCK, last - start)
        _choose(raws, start, count, thresholds[0], left, rooms, deltas, mask)
        for j in range(len(deltas)):
            delta, lanes = deltas[j], sums[j, (start - first) % LANES :]
            for i in range(count):
                lanes[i] += delta[i] * delta[i] * mask[i]
    for j in range(len(deltas)):
        for i in range(LANES):
            energy[j] += sums[j, i]


@kernel
def merge_erased(raws, first, last, thresholds, left, weights, out):  # type: ignore[no-untyped-def]
    """The last step of SCE: weights of the deltas whose sign is their sum's, renormalised."""
    rooms, deltas = _rooms(raws)
    pivot, total, share = rooms
    mask = np.empty(BLOCK, np.float32)
    for start in range(first, last, BLOCK):
        count = min(BLOCK, last - start)
        _choose(raws, start, count, thresholds[0], left, rooms, deltas, mask)
        total[:], share[:] = 0, 0
        for j in range(len(weights)):
            delta = deltas[j]
            for i in range(count):
                delta[i] *= mask[i]
                total[i] += delta[i]
        merged = out[start : start + count]
        merged[:] = 0
        for j in range(len(weights)):
            _agree(deltas[j], total, weights[j], weights[j], merged, share)
        for i in range(count):
            merged[i] = merged[i] / max(share[i], np.float32(1e-30)) + pivot[i]
