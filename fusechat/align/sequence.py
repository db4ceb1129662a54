"""Sequence alignment: which source position speaks for which pivot position.

Position n of a response holds the distribution of its n-th token. N pivot and M source positions of one chat.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

Ints = npt.NDArray[np.int64]
SAME, MANY_TO_ONE, ONE_TO_MANY, NONE = 0, 1, 2, 3
KINDS = ("same", "n:1", "1:n", "none")


def dtw(pivot: Sequence[str], source: Sequence[str]) -> tuple[Ints, Ints]:
    """Dynamic time warping of two token lists with edit distance as cost (FuseLLM, FuseChat v2: diagonal, left, up).

    Returns first, last [N]: pivot token i is aligned with the source tokens first[i] .. last[i]. O(N M) time.
    """
    pivot_unique, pivot_index = np.unique(np.asarray(pivot, object), return_inverse=True)
    source_unique, source_index = np.unique(np.asarray(source, object), return_inverse=True)
    cost = cdist(pivot_unique.tolist(), source_unique.tolist(), scorer=Levenshtein.distance, dtype=np.int32)
    first, last = _warp(cost, pivot_index, source_index)
    return first, last


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _warp(cost, rows, columns):  # type: ignore[no-untyped-def]  # numba infers the types
    n, m = len(rows), len(columns)
    total = np.empty((n, m), np.int32)
    for i in range(n):
        for j in range(m):
            if i > 0 and j > 0:
                best = min(total[i - 1, j - 1], total[i, j - 1], total[i - 1, j])
            elif i > 0:
                best = total[i - 1, j]
            elif j > 0:
                best = total[i, j - 1]
            else:
                best = np.int32(0)
            total[i, j] = cost[rows[i], columns[j]] + best
    first, last = np.empty(n, np.int64), np.full(n, -1, np.int64)
    i, j = n - 1, m - 1
    while True:
        if last[i] < 0:
            last[i] = j
        first[i] = j
        if i == 0 and j == 0:
            return first, last
        if i == 0:
            j -= 1
        elif j == 0:
            i -= 1
        else:  # the published tie order: diagonal, then left, then up
            diagonal, left, up = total[i - 1, j - 1], total[i, j - 1], total[i - 1, j]
            if diagonal <= left and diagonal <= up:
                i -= 1
                j -= 1
            elif left <= up:
                j -= 1
            else:
                i -= 1


def align_dtw(pivot: Sequence[str], source: Sequence[str]) -> tuple[Ints, npt.NDArray[np.uint8]]:
    """Positions of one response by DTW of its tokens (the end-of-turn token included).

    The position after pivot token i takes the one after the last source token of its span; where several pivot tokens
    share a source token, the last of them takes it. Returns match [N] (-1: none) and kind [N].
    """
    n = len(pivot)
    match, kind = np.full(n, -1, np.int64), np.full(n, NONE, np.uint8)
    if n == 0 or len(source) == 0:
        return match, kind
    first, last = dtw(pivot, source)
    match[0], kind[0] = 0, SAME
    shared_before = np.concatenate([[False], first[1:] == last[:-1]])
    shared_after = np.concatenate([shared_before[1:], [False]])
    for i in range(n - 1):
        if not shared_after[i] and last[i] + 1 < len(source):
            match[i + 1] = last[i] + 1
            kind[i + 1] = MANY_TO_ONE if last[i] > first[i] else ONE_TO_MANY if shared_before[i] else SAME
    return match, kind


def align_offsets(pivot: Ints, source: Ints) -> tuple[Ints, npt.NDArray[np.uint8]]:
    """Positions of one chat by the characters before them: equal boundaries belong together. Linear time.

    pivot [N], source [M]: boundaries as `fusechat.chats.render.Rendered` has them (increasing, -1 inside a character).
    Returns match [N] (-1: none) and kind [N]: how many tokens of either side the preceding step of text took.
    """
    match, kind = _match(pivot.astype(np.int64), source.astype(np.int64))
    return match, kind


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _match(pivot, source):  # type: ignore[no-untyped-def]
    n = len(pivot)
    match, kind = np.full(n, -1, np.int64), np.full(n, 3, np.uint8)
    j, last_i, last_j = 0, -1, -1
    for i in range(n):
        if pivot[i] < 0:
            continue
        while j < len(source) and source[j] < pivot[i]:
            j += 1
        if j < len(source) and source[j] == pivot[i]:
            match[i] = j
            pivot_step, source_step = i - last_i, j - last_j
            kind[i] = 0 if pivot_step == source_step == 1 else 1 if source_step >= pivot_step else 2
            last_i, last_j = i, j
    return match, kind
