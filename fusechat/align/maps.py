"""Vocabulary maps: source token id -> pivot token id, or -1 where a map has no answer.

A map is a function of the two tokenizers and the special tokens that have the same role in both,
``(source, pivot, roles) -> table``: table is int64, [source vocabulary]; roles are pairs of source and pivot ids.
None in place of a table means that no map is wanted: distributions keep their ranks for ids. What a map may need:

- ``fast``: the pivot's tokenizer reports offsets (it is a fast one);
- ``chain``: the gold token's probability is to come from the chain rule, see `fusechat.align.projection.gold_path`;
- ``counts``: a fourth argument, `PairCounts` of the corpus;
- ``rest``: source tokens without an answer keep their probability, with a rank for an id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fusechat.align.nearest import Ints, nearest
from fusechat.app.registry import Family
from fusechat.chats.vocabulary import marker, token_bytes, token_names, written

TOKEN_MAPS = Family("token_map.name", needs=("fast", "chain", "counts", "rest"))
Roles = Sequence[tuple[int, int]]


class PairCounts(NamedTuple):
    """How often a source token was aligned with a pivot token over the corpus; three arrays of equal length."""

    source: Ints
    pivot: Ints
    counts: Ints


@TOKEN_MAPS.register("em", "exact match on the tokens' bytes; what has none stays tail mass")
def em(source: Any, pivot: Any, roles: Roles) -> Ints:
    """Exact match: equal bytes, see `written` where several pivot tokens have them; special tokens by role."""
    by_bytes = written(pivot)
    return _with_roles([by_bytes.get(text, -1) if text else -1 for text in token_bytes(source)], roles)


@TOKEN_MAPS.register("mined", "minimum edit distance over the whole vocabulary (FuseLLM, corrected)")
def mined(source: Any, pivot: Any, roles: Roles) -> Ints:
    """Minimum edit distance: map(u) = argmin over v of Levenshtein(u, v), ties to the lowest id, markers made equal."""
    own, theirs = marker(source), marker(pivot)
    names = [name.replace(own, theirs) if own else name for name in token_names(source)]
    table, _ = nearest(names, token_names(pivot))
    return _with_roles(table, roles)


@TOKEN_MAPS.register(
    "ms", "mapping statistics over the corpus (FuseChat v2), unseen tokens by mined", needs=("counts",)
)
def ms(source: Any, pivot: Any, roles: Roles, seen: PairCounts) -> Ints:
    """Mapping statistics: map(u) = argmax over v of how often u was aligned with v."""
    return most_supported(seen, fallback=mined(source, pivot, roles))


@TOKEN_MAPS.register(
    "prefix",
    "the pivot token with which the pivot would begin the text, gold tokens by the chain rule (ours)",
    needs=("fast", "chain"),
)
def prefix(source: Any, pivot: Any, roles: Roles) -> Ints:
    """An exact match where there is one; else the first token of the pivot's own tokenization of that text.

    Where that is no beginning of its bytes (they need not be text): the longest pivot token that is one.
    """
    table = em(source, pivot, roles)
    pieces, by_bytes = token_bytes(pivot), written(pivot)
    longest = max(map(len, by_bytes))
    pending = [(index, text) for index, text in enumerate(token_bytes(source)) if text and table[index] < 0]
    for (index, text), first in zip(pending, _first_tokens(pivot, [text for _, text in pending]), strict=True):
        piece = pieces[first] if first is not None else None
        if first is not None and piece and text.startswith(piece):
            table[index] = first
        else:
            beginnings = (text[:n] for n in range(min(longest, len(text)), 0, -1))
            table[index] = next((by_bytes[b] for b in beginnings if b in by_bytes), -1)
    return table


@TOKEN_MAPS.register("uld", "no map; probabilities by rank, for loss.kind=uld")
def uld(source: Any, pivot: Any, roles: Roles) -> None:
    """No map: the sorted-probability distance (ULD, arXiv 2402.12030) compares probabilities by rank."""


@TOKEN_MAPS.register(
    "hybrid", "exact match; what has none keeps its probability by rank, for loss.kind=hybrid", needs=("rest",)
)
def hybrid(source: Any, pivot: Any, roles: Roles) -> Ints:
    """As `em`; the tokens that the pivot's vocabulary lacks are compared by rank (GOLD, NeMo-RL)."""
    return em(source, pivot, roles)


def most_supported(seen: PairCounts, fallback: Ints) -> Ints:
    """The pivot token most often aligned with each source token, ties to the lowest id; unseen ones by ``fallback``."""
    table = fallback.copy()
    order = np.lexsort((-seen.pivot, seen.counts))  # the last write wins: most counted, then lowest id
    table[seen.source[order]] = seen.pivot[order]
    return table


def _first_tokens(tokenizer: Any, texts: Sequence[bytes]) -> list[int | None]:
    """The first token of each text in mid-line: the first that ends behind a newline put before the text."""
    if not texts:
        return []
    lines = ["\n" + text.decode("utf-8", "replace") for text in texts]
    return [
        next((token for token, (_, end) in zip(line.ids, line.offsets, strict=True) if end > 1), None)
        for line in tokenizer(lines, add_special_tokens=False).encodings
    ]


def _with_roles(table: Any, roles: Roles) -> Ints:
    found = np.asarray(table, np.int64)
    for source_id, pivot_id in roles:
        found[source_id] = pivot_id
    return found
