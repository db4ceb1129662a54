"""The chain rule over a source's path: a distribution on the pivot's tokens at every place of the text.

The source's store knows p_j(u), its next token at each position j of its own path u*_0 u*_1 … through the text. What it
says of the text behind a place is a set of beginnings, each with its probability: with j the source position at or
before the place and c the bytes of u*_j before it,

    u[c:]                        with p_j(u) / M              for the kept u that go on as c,
    u*_j[c:] u                   with p_j(u*_j) p_{j+1}(u) / M,
    u*_j[c:] u*_{j+1} u          with p_j(u*_j) p_{j+1}(u*_{j+1}) p_{j+2}(u) / M,    and so on.

A token goes on as c if it begins with c and the pivot cuts it as it has cut c. M is their probability, with the tail's
part, which is spread evenly over the tokens without an entry (1 where c is empty). Each beginning goes to the pivot
token that would begin it:

- the pivot's gold token g for the path itself, once it covers g, and for all that agrees with the text beyond g;
- where the beginning is one whole token of the source, what the token map says of it;
- else the longest token of the pivot with which it begins. Where there is none, it stays tail mass.

What follows a token that is not on the path is not stored: its own text is all that it says, and a token that ends at
the place says nothing. The gold token's probability is the source's throughout. Entries that are samples stay samples:
their shares take the probabilities' part.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from fusechat.align.nearest import Ints
from fusechat.align.paths import SPACE, Lexicon, Path
from fusechat.align.projection import FLOOR, Floats, Ragged, _add, _sort, _tail_share
from fusechat.align.trie import NOWHERE, Bytes, walk


class Stored(NamedTuple):
    """What the source holds, as in `Ragged`, as probabilities; drawn: entries are samples."""

    starts: Ints
    ids: Ints
    probs: Floats
    gold: Floats
    drawn: bool


class Chat(NamedTuple):
    """One chat by both tokenizers, and the table of whole tokens. text: the pivot's tokens as bytes, i at at[i]."""

    pivot: Path
    own: Path
    table: Ints
    words: Lexicon
    text: Bytes
    at: Ints


def follow(
    source: Ragged,
    match: Ints,
    pivot: Path,
    own: Path,
    table: Ints,
    words: Lexicon,
    pivot_size: int,
    unmatched_gold: bool,
    drawn: bool = False,
) -> Ragged:
    """The source's distributions at all matched positions, on the pivot's ids, most likely first.

    match [N]: for each pivot position the source position at its place, or the one in whose token the place lies, see
    `fusechat.align.paths.cut`; -1 none. The rest, and what comes back, is as in `fusechat.align.projection.project`.
    """
    pieces = [words.pivot_texts.flat[slice(*words.pivot_texts.starts[[token, token + 1]])] for token in pivot.gold]
    at = np.cumsum([0, *map(len, pieces)])
    chat = Chat(pivot, own, table, words, np.concatenate([np.empty(0, np.uint8), *pieces]), at)
    probs, gold_probs = np.exp(source.logprobs), np.exp(source.gold_logprob)
    stored = Stored(source.starts, source.ids.astype(np.int64), probs, gold_probs, drawn)
    last = _reach(match, pivot.places, own.places)
    counts, ids, probs, gold_p = _follow(stored, chat, match, last, pivot_size, unmatched_gold)
    return Ragged(counts, ids, np.log(probs), np.log(gold_p))


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _reach(match, pivot, source):  # type: ignore[no-untyped-def]
    """The source position whose gold token covers the end of each pivot token, [N]; its first where that is unknown."""
    last = match.copy()
    for i in range(len(match)):
        end, j = pivot[i + 1], match[i]
        while 0 <= j < len(source) - 1 and source[j + 1] < end:
            j += 1
        if 0 <= j < len(source) - 1:
            last[i] = j
    return last


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _follow(stored, chat, match, last, pivot_size, unmatched_gold):  # type: ignore[no-untyped-def]
    n, room = len(match), 0
    for i in range(n):
        room += stored.starts[last[i] + 1] - stored.starts[match[i]] + 1 if match[i] >= 0 else 1
    counts, gold_out = np.zeros(n, np.int64), np.ones(n, np.float32)
    ids, out, end = np.empty(room, np.int64), np.empty(room, np.float32), 0
    for i in range(n):
        begin, known = end, 1.0
        if match[i] >= 0:
            end, known = _position(stored, chat, i, match[i], last[i], ids, out, begin)
            _sort(ids, out, begin, end)
        elif unmatched_gold:
            end = _add(ids, out, begin, end, chat.pivot.gold[i], 1.0)
        counts[i] = end - begin
        gold_out[i] = known if known > 0 else _tail_share(out, begin, end, pivot_size)
    return counts, ids[:end], out[:end], gold_out


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _position(stored, chat, i, first, last, ids, out, begin):  # type: ignore[no-untyped-def]
    """Fills in P at pivot position i, whose path is the source's tokens first .. last; its end and P(gold token)."""
    gold, end, known, beside = chat.pivot.gold[i], begin, 0.0, 0.0
    share = ahead = 1.0 / _mass(stored, chat, i, first)  # of the path so far: as entries, and as the source has it
    for j in range(first, last + 1):
        known, own_share, beside = known + beside, 0.0, 0.0
        for e in range(stored.starts[j], stored.starts[j + 1]):
            token, mass = stored.ids[e], share * stored.probs[e]
            if token == chat.own.gold[j]:
                own_share = stored.probs[e]
            elif j > first or _goes_on(chat, token, j, i):
                target = _target(chat, token, j, i)
                if target == gold:
                    beside += ahead * stored.probs[e]
                if target >= 0 and mass > FLOOR:
                    end = _add(ids, out, begin, end, target, mass)
        share *= own_share if stored.drawn else stored.gold[j]
        if j == last and _inside(chat, i + 1, j):
            beside, ahead = ahead * _mass(stored, chat, i + 1, j), 0.0  # what the next position is given
        ahead *= stored.gold[j]
    if share > 0:
        end = _add(ids, out, begin, end, gold, share)
    return end, known + beside + ahead


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _inside(chat, i, j):  # type: ignore[no-untyped-def]
    """Whether pivot position i lies inside the source's gold token at j."""
    return chat.own.places[j] < chat.pivot.places[i] < chat.own.places[j + 1]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _mass(stored, chat, i, j):  # type: ignore[no-untyped-def]
    """M at pivot position i, given the source's position j: 1 where its token is whole."""
    if not _inside(chat, i, j):
        return 1.0
    gold, tree = chat.own.gold[j], chat.words.tree
    mass, kept, fitting, entries = stored.gold[j], stored.gold[j], 1, 1
    for e in range(stored.starts[j], stored.starts[j + 1]):
        if stored.ids[e] != gold:
            kept += stored.probs[e]
            entries += 1
            if _goes_on(chat, stored.ids[e], j, i):
                mass += stored.probs[e]
                fitting += 1
    node, _, _ = walk(tree, 0, _prefix(chat, j, i))
    if stored.drawn or node < 0:
        return mass
    return mass + max(0.0, 1.0 - kept) * max(0, tree.below[node] - fitting) / max(1, tree.below[0] - entries)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _prefix(chat, j, i):  # type: ignore[no-untyped-def]
    """What of the source's gold token at j lies before pivot position i."""
    start, size = chat.words.texts.starts[chat.own.gold[j]], chat.pivot.places[i] - chat.own.places[j]
    return chat.words.texts.flat[start : start + max(0, size + chat.own.lead[j])]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _goes_on(chat, token, j, i):  # type: ignore[no-untyped-def]
    """Whether the source's ``token`` at j begins with what lies before pivot position i, and the pivot cuts it so."""
    begins, prefix, of = chat.own.places[j], _prefix(chat, j, i), chat.words.texts
    if not _inside(chat, i, j):
        return True
    start = of.starts[token]
    if of.starts[token + 1] - start < len(prefix) or (of.flat[start : start + len(prefix)] != prefix).any():
        return False
    k = i - 1
    while k >= 0 and chat.pivot.places[k + 1] > begins and chat.pivot.places[k] >= 0:
        if _target(chat, token, j, k) != chat.pivot.gold[k]:
            return False
        k -= 1
    return True


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _target(chat, token, j, i):  # type: ignore[no-untyped-def]
    """The pivot token at position i that the source's ``token`` at its position j stands for, or -1."""
    of, ahead, lead = chat.words.texts, chat.own.places[j] - chat.pivot.places[i], chat.pivot.lead[i]
    start, stop = of.starts[token], of.starts[token + 1]
    if ahead == 0 and (start == stop or chat.own.lead[j] == lead):
        return chat.table[token]
    begin, next_ = chat.at[i], chat.at[i + 1]
    before = max(0, ahead) + lead  # bytes of the path, and the space that the chat has not
    spelt = (
        next_ - begin - lead == chat.pivot.places[i + 1] - chat.pivot.places[i]
    )  # the gold token's bytes are the text
    if ahead != 0 and (not spelt or before > next_ - begin or (start == stop and ahead < 0)):
        return NOWHERE
    if chat.own.lead[j] and start < stop and of.flat[start] == SPACE:
        start += 1
    start += max(0, -ahead)
    if start >= stop and ahead < 0:  # it ends at the place
        return NOWHERE
    beginning = np.concatenate((chat.text[begin : begin + before], of.flat[start:stop]))
    _, found, length = walk(chat.words.pivot_tree, 0, beginning)
    same, least = 0, max(length, next_ - begin)
    while same < min(len(beginning), len(chat.text) - begin) and beginning[same] == chat.text[begin + same]:
        same += 1
    return chat.pivot.gold[i] if next_ > begin and same >= least else found
