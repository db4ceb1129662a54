"""The same text for every model: what each spends on the characters that all of them predict.

A chat is cut at ``max_length`` tokens of each model's own, and a text's first token is predicted by nothing: the totals
of two models may be of different texts. With b_m the places, in bytes of assistant text, where model m stands between
two characters, its end included, C the places that all models share, a = min C and e = max C,

    nats_m = sum of -log p_m(x_t) over its positions t with a <= b_m(t) < e,   bytes = e - a.

A store of a source's distributions knows nothing of other sources, so an aligned store holds the nats between every two
places that it shares with the pivot, ``spent`` [N + 1]: N positions of the pivot and its end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fusechat.stores.encoding import Array
from fusechat.stores.store import DistributionStore

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def places(store: DistributionStore, row: int) -> Ints:
    """Bytes of assistant text before each position and at the end, [N + 1]; -1 inside a character."""
    (boundaries,) = store.row(row, "boundaries")
    return np.append(boundaries, store.ends[row]).astype(np.int64)


def spent(pivot: Ints, source: Ints, gold_logprob: Array) -> Array:
    """A source's nats from each place that it shares with the pivot to the next, at the latter, [N + 1].

    pivot [N + 1], source [M + 1]: places. gold_logprob [M]: the source's. 0 at the first shared place, NaN elsewhere.
    """
    nats = np.full(len(pivot), np.nan, np.float16)
    before = np.concatenate([[0.0], -np.cumsum(gold_logprob, dtype=np.float64)])
    _, at, own = np.intersect1d(pivot, np.where(source < 0, -2, source), return_indices=True)
    nats[at] = np.diff(before[own], prepend=before[own[:1]])
    return nats


def chunks(spent: Floats) -> tuple[Ints, Floats]:
    """The chunk of text of each of the pivot's positions, by number, and the source's nats for it, both [N].

    A chunk is what lies between two neighbouring places that the pivot shares with the source: both spell the same
    text, each in its own tokens. spent [N + 1]: see `spent`. Infinite where a position lies in none: before the first
    shared place, or behind the last.
    """
    shared = np.flatnonzero(np.isfinite(spent))
    number = np.searchsorted(shared, np.arange(len(spent) - 1), side="right")
    return number, np.concatenate([[np.inf], spent[shared[1:]], [np.inf]])[number]


def same_range(pivot: Ints, source: Ints) -> bool:
    """Whether both predict the same characters, so that their totals can be compared."""
    return bool((pivot[[0, -1]] == source[[0, -1]]).all() and pivot[[0, -1]].min() >= 0 and len(source) > 1)


def compared(pivot: Ints, positions: Ints, n_bytes: int, nats: Floats) -> tuple[Floats, int]:
    """nats_m of S models and the bytes they are of. Models that share no text with the pivot: infinite, and left out.

    pivot [N + 1]: places; positions [N], whose gaps are the ends of turns; n_bytes: of all that the pivot predicts;
    nats [S, N + 1]: `spent`, the pivot's first.
    """
    speaks = np.isfinite(nats[:, pivot >= 0]).sum(1) > 1
    shared = np.flatnonzero((pivot >= 0) & np.isfinite(nats[speaks]).all(0))
    if len(shared) < 2:
        return np.full(len(nats), np.inf), 0
    first, last = int(shared[0]), int(shared[-1])
    total = np.where(speaks, np.nansum(nats[:, first + 1 : last + 1], 1), np.inf)
    before = pivot[:-1] - np.cumsum(np.diff(positions, prepend=positions[0] - 1) != 1)  # turns are one byte apart
    end = before[np.argmax(pivot >= 0)] + n_bytes
    return total, int((end if last == len(before) else before[last]) - before[first])


class CommonText:
    """nats and bytes of the text that all of some stores predict. stores: the pivot's first, then the aligned ones."""

    def __init__(self, stores: Sequence[DistributionStore]) -> None:
        self.stores = stores
        self.nats = np.stack([store.column("nats") for store in stores], 1)
        self.n_bytes = stores[0].column("bytes")
        self.whole = np.ones(len(self.n_bytes), bool)  # chats whose totals are of the same text
        for store in (store for store in stores if "same_range" in store.columns):
            self.whole &= store.column("same_range")

    def __call__(self, rows: Sequence[int]) -> tuple[Floats, Floats]:
        """nats [B, S] and bytes [B, 1]."""
        nats, n_bytes = self.nats[rows], self.n_bytes[rows].astype(np.float64)
        for at, row in enumerate(rows):
            if not self.whole[row] and n_bytes[at] > 0:
                pivot, (positions,) = places(self.stores[0], row), self.stores[0].row(row, "positions")
                each = np.stack([self.spent(store, row, pivot) for store in self.stores])
                nats[at], n_bytes[at] = compared(pivot, positions, int(n_bytes[at]), each)
        return nats, n_bytes[:, None]

    @staticmethod
    def spent(store: DistributionStore, row: int, pivot: Ints) -> Floats:
        """As it is stored; a store that shares the pivot's tokens shares all its places."""
        if "spent" in store.columns:
            return store.row(row, "spent")[0].astype(np.float64)
        return spent(pivot, pivot, store.row(row, "gold_logprob")[0]).astype(np.float64)
