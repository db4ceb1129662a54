"""Where an assistant's turns lie among the tokens of a chat, and how much of their text lies before each token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Turns:
    """The turns of one chat, added one after the other. T tokens; places in the assistant's text are UTF-8 bytes, all
    turns end to end, one byte apart.

    mask [T]: the tokens to train on; before [T]: the place where a token begins, -1 where it is not trained on; inside
    [T]: whether it adds no whole character. total: the place behind the turns so far; reached: how far tokens
    reach; n_bytes: bytes of the characters that are predicted. torn: the last token ends in a character.
    """

    def __init__(self, text: str, offsets: Ints, torn: bool) -> None:
        self.starts, self.ends = _increasing(offsets)
        self.bytes_before = _bytes_before(text)
        self.covered = int(self.ends[-1]) - torn if len(offsets) else 0  # characters that the tokens reach
        self.inside = np.insert((self.ends[1:] == self.ends[:-1]) | (offsets[1:, 0] < self.ends[:-1]), 0, True)
        self.mask, self.before = np.zeros(len(offsets), bool), np.full(len(offsets), -1, np.int64)
        self.total = self.reached = self.n_bytes = 0

    def after(self, end: int) -> int:
        """The first token that lies beyond a character."""
        return int(np.searchsorted(self.ends, end, side="right"))

    def add(self, first: int, end: int, close: int | None) -> None:
        """A turn of the characters [first, end) of the chat; close: the special token that ends it, if it is there."""
        begin, stop = self.after(first), int(np.searchsorted(self.starts, end))
        if begin < stop:
            self._add_content(first, end, begin, stop)
        self.total += self._bytes(first, end)
        if close is not None:
            self.mask[close] = True
            self.before[close] = self.total
            self.reached = self.total + 1
        self.total += 1

    def _add_content(self, first: int, end: int, begin: int, stop: int) -> None:
        """The tokens [begin, stop) touch the content: the first begins with it, the others where one has ended."""
        self.mask[begin:stop] = True
        self.before[begin] = self.total
        others = np.clip(self.ends[begin : stop - 1], first, end)
        self.before[begin + 1 : stop] = self.total + self.bytes_before[others] - self.bytes_before[first]
        seen = max(first, min(end, self.covered))
        self.reached = self.total + self._bytes(first, seen)
        predicted = first if begin else _first_predicted(self.ends, self.inside, end)
        self.n_bytes += max(0, self._bytes(predicted, seen))

    def _bytes(self, first: int, end: int) -> int:
        return int(self.bytes_before[end] - self.bytes_before[first])


def _increasing(offsets: Ints) -> tuple[Ints, Ints]:
    """First and end characters of the tokens so that neither ever decreases, which tokenizers do not promise.

    A token starts at most where the one before it ends: what lies between two tokens belongs to the later one.
    """
    starts, ends = offsets[:, 0].copy(), np.maximum.accumulate(offsets[:, 1])
    starts[1:] = np.minimum(starts[1:], ends[:-1])
    return np.maximum.accumulate(starts), ends


def _bytes_before(text: str) -> Ints:
    """How many UTF-8 bytes lie before each character of a text, and in all, [characters + 1]."""
    if text.isascii():
        return np.arange(len(text) + 1)
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return np.concatenate([[0], np.cumsum(1 + (code > 0x7F) + (code > 0x7FF) + (code > 0xFFFF), dtype=np.int64)])


def _first_predicted(ends: Ints, inside: npt.NDArray[np.bool_], end: int) -> int:
    """The first character of a text that is predicted, of a turn that ends at ``end``: nothing predicts token 0."""
    fresh = np.flatnonzero(~inside)
    return min(end, int(ends[fresh[0] - 1])) if len(fresh) else end
