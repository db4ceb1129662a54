"""A chat's tokens as paths through its text, by places in bytes, and what both vocabularies' tokens spell."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from fusechat.align.nearest import Ints
from fusechat.align.trie import NOWHERE, Texts, Trie, texts, trie
from fusechat.chats.vocabulary import token_bytes, written

SPACE = 32


class Path(NamedTuple):
    """A chat's tokens by one tokenizer. gold [N]; places [N + 1] in bytes, see `filled`, -1 unknown.

    lead [N]: 1 where a token's text has a space that the chat has not (SentencePiece's at the beginning of a text).
    """

    gold: Ints
    places: Ints
    lead: Ints


class Lexicon(NamedTuple):
    """Both vocabularies, the source's first: the tokens' texts, and their trees."""

    texts: Texts
    tree: Trie
    pivot_texts: Texts
    pivot_tree: Trie


def lexicon(source: Any, pivot: Any) -> Lexicon:
    """The `Lexicon` of two tokenizers."""
    both = [(texts(token_bytes(tokenizer)), trie(written(tokenizer))) for tokenizer in (source, pivot)]
    return Lexicon(*both[0], *both[1])


def path(gold: Ints, places: Ints, of: Texts) -> Path:
    """A chat's `Path` from its tokens and their `places` between characters."""
    gold, lengths = gold.astype(np.int64), np.diff(of.starts)[gold]
    known = filled(places.astype(np.int64), lengths)
    begins = np.append(of.flat, 0)[of.starts[:-1][gold]] == SPACE
    lead = begins & (np.minimum(known[:-1], known[1:]) >= 0) & (lengths == np.diff(known) + 1)
    return Path(gold, known, lead.astype(np.int64))


def cut(match: Ints, pivot: Path, own: Path, of: Texts) -> npt.NDArray[np.bool_]:
    """Whether each pivot position's place lies inside its partner's token, whose bytes are the text's, [N]. of: its."""
    skip, span = pivot.places[:-1] - own.places[match], np.diff(own.places)[match]
    spelt = np.diff(of.starts)[own.gold[match]] == span + own.lead[match]
    return np.asarray((match >= 0) & (skip > 0) & (skip < span) & spelt)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def filled(places, lengths):  # type: ignore[no-untyped-def]
    """places [N + 1] with those inside characters too, where the tokens' bytes [N] add up to the text's; else -1."""
    out, last = places.copy(), 0
    for i in range(1, len(places)):
        if places[i] >= 0:
            if out[i - 1] + lengths[i - 1] != places[i]:
                out[last + 1 : i] = NOWHERE
            last = i
        elif out[i - 1] >= 0:
            out[i] = out[i - 1] + lengths[i - 1]
    out[last + 1 :] = NOWHERE  # nothing behind to compare with
    return out
