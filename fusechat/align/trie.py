"""A vocabulary as a prefix tree of bytes: which token begins a text, and how many tokens a text begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from fusechat.align.nearest import Ints

NOWHERE = -1  # no node, no token
Bytes = npt.NDArray[np.uint8]


class Trie(NamedTuple):
    """Nodes by level, the root first; the children of n are first[n] to first[n + 1], in the order of their bytes.

    byte [nodes]: the last of a node's text. token [nodes]: the id that has this text, or -1. below [nodes]: how many
    tokens begin with it.
    """

    first: Ints
    byte: Bytes
    token: Ints
    below: Ints


class Texts(NamedTuple):
    """Texts of ids as bytes, end to end: id i has flat[starts[i]] to flat[starts[i + 1]], nothing if special."""

    flat: Bytes
    starts: Ints


def texts(pieces: Sequence[bytes | None]) -> Texts:
    """`fusechat.chats.vocabulary.token_bytes` end to end."""
    known = [piece or b"" for piece in pieces]
    return Texts(np.frombuffer(b"".join(known), np.uint8), np.cumsum([0, *map(len, known)]))


def trie(ids: Mapping[bytes, int]) -> Trie:
    """The tree of some texts, level by level. ids: text -> token."""
    words = sorted(ids)
    flat, starts = texts(words)
    tokens, lengths = np.array([ids[word] for word in words], np.int64), np.diff(starts)
    node = np.zeros(len(words), np.int64)
    parents, bytes_, token, below = (
        [np.array([-1])],
        [np.zeros(1, np.int64)],
        [np.array([-1])],
        [np.array([len(words)])],
    )
    made = 1
    for depth in range(int(lengths.max(initial=0))):
        longer = np.flatnonzero(lengths > depth)
        keys, inverse = np.unique(node[longer] << 8 | flat[starts[longer] + depth], return_inverse=True)
        node[longer] = made + inverse
        ends = longer[lengths[longer] == depth + 1]
        found = np.full(len(keys), NOWHERE)
        found[node[ends] - made] = tokens[ends]
        parents.append(keys >> 8)
        bytes_.append(keys & 255)
        token.append(found)
        below.append(np.bincount(inverse))
        made += len(keys)
    parent = np.concatenate(parents)
    first = np.searchsorted(parent, np.arange(made + 1))
    return Trie(first, np.concatenate(bytes_).astype(np.uint8), np.concatenate(token), np.concatenate(below))


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def child(tree, node, byte):  # type: ignore[no-untyped-def]
    """The node one byte further, or -1."""
    low, high = tree.first[node], tree.first[node + 1]
    while low < high:
        middle = (low + high) // 2
        if tree.byte[middle] < byte:
            low = middle + 1
        else:
            high = middle
    return low if low < tree.first[node + 1] and tree.byte[low] == byte else NOWHERE


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def walk(tree, node, text):  # type: ignore[no-untyped-def]
    """The node after all of ``text``, or -1; and the last token on the way with the bytes at which it ends."""
    token, size = NOWHERE, 0
    for k in range(len(text)):
        node = child(tree, node, text[k])
        if node < 0:
            break
        if tree.token[node] >= 0:
            token, size = tree.token[node], k + 1
    return node, token, size
