"""Sequence alignment: which source position speaks for which pivot position.

Position n of a response holds the distribution of its n-th token. N pivot and M source positions.
A member is a function ``(pivot, source) -> match [N], kind [N]``: match is the source position, -1 where there is none;
kind is one of `fusechat.stores.kinds`. What it needs says what the two arguments are:

- ``texts``: the tokens' bytes, each as a string of as many characters (latin-1); one response at a time;
- ``boundaries``: the characters of the chat before each position, as `fusechat.chats.render.Rendered` has them
  (increasing, -1 inside a character); a whole chat at a time. Only fast tokenizers report them;
- ``path`` (with boundaries): those inside characters too, by the tokens' bytes, and with the end; distributions are
  then brought over by `fusechat.align.chain`, which can use a source position *before* a pivot position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fusechat.align.nearest import Ints
from fusechat.app.registry import Family
from fusechat.stores.kinds import INSIDE, MANY_TO_ONE, NONE, ONE_TO_MANY, SAME

SEQUENCES = Family("alignment.sequence", needs=("texts", "boundaries", "path"))
Kinds = npt.NDArray[np.uint8]


def unmatched(positions: int) -> tuple[Ints, Kinds]:
    """match and kind of so many positions, none of which has a partner."""
    return np.full(positions, -1, np.int64), np.full(positions, NONE, np.uint8)


@SEQUENCES.register("dtw", "dynamic time warping of the tokens by edit distance (published)", needs=("texts",))
def align_dtw(pivot: Sequence[str], source: Sequence[str]) -> tuple[Ints, Kinds]:
    """Positions of one response by DTW of its tokens (the end-of-turn token included).

    The position after pivot token i takes the one after the last source token of its span; where several pivot tokens
    share a source token, the last of them takes it.
    """
    match, kind = unmatched(len(pivot))
    if len(pivot) == 0 or len(source) == 0:
        return match, kind
    first, last = dtw(pivot, source)
    match[0], kind[0] = 0, SAME
    shared_before = np.concatenate([[False], first[1:] == last[:-1]])
    shared_after = np.concatenate([shared_before[1:], [False]])
    for i in range(len(pivot) - 1):
        if not shared_after[i] and last[i] + 1 < len(source):
            match[i + 1] = last[i] + 1
            kind[i + 1] = MANY_TO_ONE if last[i] > first[i] else ONE_TO_MANY if shared_before[i] else SAME
    return match, kind


@SEQUENCES.register("offsets", "equal character offsets belong together: exact and linear", needs=("boundaries",))
def align_offsets(pivot: Ints, source: Ints) -> tuple[Ints, Kinds]:
    """Positions of one chat by the characters before them: equal boundaries belong together. O(N + M) time."""
    match, kind = _match(pivot.astype(np.int64), source.astype(np.int64))
    return match, kind


@SEQUENCES.register(
    "chain", "every place of the text, inside source tokens too, by the chain rule (ours)", needs=("boundaries", "path")
)
def align_chain(pivot: Ints, source: Ints) -> tuple[Ints, Kinds]:
    """As `align_offsets` where both stand at a place; else the source token in which the place lies. With the ends."""
    match, kind = align_offsets(pivot[:-1], source[:-1])
    places = np.flatnonzero(source >= 0)
    at = np.searchsorted(source[places], pivot[:-1]) - 1  # the last source place before
    at_known = places[np.clip(at, 0, None)] if len(places) else np.zeros(len(match), np.int64)
    follows = np.minimum(at_known + 1, len(source) - 1)
    inside = (match < 0) & (pivot[:-1] >= 0) & (at >= 0) & (source[follows] > pivot[:-1])
    match[inside], kind[inside] = at_known[inside], INSIDE
    return match, kind


def dtw(pivot: Sequence[str], source: Sequence[str]) -> tuple[Ints, Ints]:
    """Dynamic time warping of two token lists with edit distance as cost (FuseLLM, FuseChat v2). O(N M) time.

    D[i, j] = cost(i, j) + min(D[i-1, j-1], D[i, j-1], D[i-1, j]); the path runs back from D[N-1, M-1].
    Returns first, last [N]: pivot token i is aligned with the source tokens first[i] .. last[i].
    """
    pivot_unique, pivot_index = np.unique(np.asarray(pivot, object), return_inverse=True)
    source_unique, source_index = np.unique(np.asarray(source, object), return_inverse=True)
    scorer: Any = Levenshtein.distance
    cost = cdist(pivot_unique.tolist(), source_unique.tolist(), scorer=scorer, dtype=np.int32)
    first, last = _way_back(_warp(cost, pivot_index, source_index))
    return first, last


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _warp(cost, rows, columns):  # type: ignore[no-untyped-def]  # numba infers the types
    """D [N, M] from the costs of distinct tokens; rows [N] and columns [M] index them."""
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
    return total


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _way_back(total):  # type: ignore[no-untyped-def]
    """first and last column of every row on the cheapest path; ties as published: diagonal, then left, then up."""
    n, m = total.shape
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
        else:
            diagonal, left, up = total[i - 1, j - 1], total[i, j - 1], total[i - 1, j]
            if diagonal <= left and diagonal <= up:
                i -= 1
                j -= 1
            elif left <= up:
                j -= 1
            else:
                i -= 1


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _match(pivot, source):  # type: ignore[no-untyped-def]
    """One pass over both boundaries. kind: by the tokens that either side took for the text since the last match."""
    n = len(pivot)
    match, kind = np.full(n, -1, np.int64), np.full(n, NONE, np.uint8)
    j, last_i, last_j = 0, -1, -1
    for i in range(n):
        if pivot[i] < 0:
            continue
        while j < len(source) and source[j] < pivot[i]:
            j += 1
        if j < len(source) and source[j] == pivot[i]:
            match[i] = j
            pivot_step, source_step = i - last_i, j - last_j
            unequal = MANY_TO_ONE if source_step >= pivot_step else ONE_TO_MANY
            kind[i] = SAME if pivot_step == source_step == 1 else unequal
            last_i, last_j = i, j
    return match, kind
