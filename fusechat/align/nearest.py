"""The nearest of many strings by Levenshtein distance, for whole vocabularies: 10^10 pairs in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fusechat.app import threads

Ints = npt.NDArray[np.int64]
WORD = 64  # bits of a machine word: the longest name whose column of the distance matrix fits into one
FAR = 1 << 30  # farther than any string


def nearest(names: Sequence[str], candidates: Sequence[str]) -> tuple[Ints, Ints]:
    """For each name the candidate of smallest Levenshtein distance (code points), ties to the lowest index.

    Returns indices and distances, both [names]. An exact match is looked up, a name of at most `WORD` characters is
    searched by the kernel, and rapidfuzz takes the few that are longer or empty.
    """
    exact: dict[str, int] = {}
    for index, candidate in enumerate(candidates):
        exact.setdefault(candidate, index)
    found = np.array([exact.get(name, -1) for name in names], np.int64)
    distance = np.where(found >= 0, 0, -1)
    short = [i for i in np.flatnonzero(found < 0).tolist() if 0 < len(names[i]) <= WORD]
    if short:
        found[short], distance[short] = _search([names[i] for i in short], candidates)
    scorer: Any = Levenshtein.distance
    for i in np.flatnonzero(found < 0).tolist():
        row = cdist([names[i]], list(candidates), scorer=scorer, dtype=np.int32)[0]
        found[i], distance[i] = int(row.argmin()), int(row.min())
    return found, distance


def _search(names: Sequence[str], candidates: Sequence[str]) -> tuple[Ints, Ints]:
    """`nearest` for short names, shared out over threads: thread t of T takes the names t, t + T, t + 2 T, …"""
    characters = sorted({c for text in (*candidates, *names) for c in text})
    alphabet = {character: code for code, character in enumerate(characters)}
    by_length = sorted(range(len(candidates)), key=lambda i: (len(candidates[i]), i))
    texts = _packed([candidates[i] for i in by_length], alphabet)
    best, score = np.full(len(names), -1, np.int64), np.full(len(names), FAR, np.int64)
    packed = (*_packed(names, alphabet), *texts, np.array(by_length), len(alphabet))
    parts = threads.count()
    threads.share(lambda part: _nearest(part, parts, best, score, *packed), parts)
    return best, score


def _packed(texts: Sequence[str], alphabet: dict[str, int]) -> tuple[npt.NDArray[np.int32], Ints]:
    """Strings end to end as character codes, and where each starts: text i is codes[starts[i] : starts[i + 1]]."""
    starts = np.cumsum([0, *map(len, texts)])
    return np.fromiter((alphabet[c] for text in texts for c in text), np.int32, int(starts[-1])), starts


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _nearest(  # type: ignore[no-untyped-def]
    part, parts, best, score, names, name_starts, texts, starts, ids, alphabet
):
    """Fills best and score [names] for every ``parts``-th name. Candidates (texts, starts) are sorted by length.

    The distance is at least the difference in length, so candidates are visited by that difference, and the search ends
    where it exceeds the best distance found.
    """
    lengths = starts[1:] - starts[:-1]
    longest = lengths[len(ids) - 1]
    masks = np.zeros(alphabet, np.uint64)  # bit k of masks[c]: whether the name's character k is c
    for n in range(part, len(name_starts) - 1, parts):
        name = names[name_starts[n] : name_starts[n + 1]]
        size = len(name)
        for k in range(size):
            masks[name[k]] |= np.uint64(1) << np.uint64(k)
        gap = 0
        while gap <= score[n] and (gap <= size or size + gap <= longest):
            for side in range(1 if gap == 0 else 2):
                length = size - gap if side == 0 else size + gap
                low, high = np.searchsorted(lengths, length), np.searchsorted(lengths, length, side="right")
                for c in range(low, high):
                    d = _distance(masks, size, texts, starts[c], starts[c + 1])
                    if d < score[n] or (d == score[n] and ids[c] < best[n]):
                        score[n], best[n] = d, ids[c]
            gap += 1
        for k in range(size):
            masks[name[k]] = np.uint64(0)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _distance(masks, size, texts, begin, end):  # type: ignore[no-untyped-def]
    """Levenshtein distance of a name of ``size`` characters, given as masks, from texts[begin:end].

    Myers' bit-parallel algorithm (1999) in Hyyrö's form: the matrix of distances D[i, j] column by column. Bit i of pv
    and mv says whether D[i, j] - D[i - 1, j] is +1 or -1, bit i of ph and mh the same of D[i, j] - D[i, j - 1].
    """
    one = np.uint64(1)
    last_row = one << np.uint64(size - 1)
    pv, mv, distance = ~np.uint64(0), np.uint64(0), size
    for j in range(begin, end):
        equal = masks[texts[j]]
        xv = equal | mv
        xh = (((equal & pv) + pv) ^ pv) | equal
        ph = mv | ~(xh | pv)
        mh = pv & xh
        if ph & last_row:
            distance += 1
        elif mh & last_row:
            distance -= 1
        ph = (ph << one) | one
        mh = mh << one
        pv = mh | ~(xv | ph)
        mv = ph & xv
    return distance
