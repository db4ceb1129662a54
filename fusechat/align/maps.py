"""Vocabulary maps: source token id -> pivot token id, or -1 where a map has no answer.

What a token is in bytes is read from the tokenizer's own decoder, so that no list of tokenizer classes is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fusechat.app import threads
from fusechat.app.errors import UserError

Ints = npt.NDArray[np.int64]
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """What every id stands for in a text, as bytes; None for special tokens and ids without a token."""
    tokens: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if not tokenizer.is_fast:
        return _slow_bytes(tokenizer, tokens)
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder")
    kinds = {part["type"] for part in _parts(decoder)}
    added = {index: str(token.content) for index, token in tokenizer.added_tokens_decoder.items()}
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    spaces = [p["pattern"]["String"] for p in _parts(decoder) if p["type"] == "Replace" and p["content"] == " "]
    spaces += [p["replacement"] for p in _parts(decoder) if p["type"] == "Metaspace"]

    def of(index: int, token: str | None) -> bytes | None:
        if token is None or index in special:
            return None
        if index in added:
            return added[index].encode()
        if "ByteLevel" in kinds:
            return bytes(to_byte[c] for c in token) if all(c in to_byte for c in token) else token.encode()
        if byte := BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        for mark in spaces:
            token = token.replace(mark, " ")
        return token.encode()

    return [of(index, token) for index, token in enumerate(tokens)]


def _slow_bytes(tokenizer: Any, tokens: Sequence[str | None]) -> list[bytes | None]:
    """A slow tokenizer has no decoder to read: each token's own string; bytes that are no text alone come out empty."""
    special, found = set(tokenizer.all_special_ids), list[bytes | None]()
    for index, token in enumerate(tokens):
        text = "" if token is None else str(tokenizer.convert_tokens_to_string([token]))
        lost = (
            token is not None and token.startswith("▁") and not text.startswith(" ")
        )  # the space that a text's first word loses
        found.append(None if token is None or index in special else (" " * lost + text).encode())
    return found


def special_roles(tokenizer: Any, end_of_turn: int | None = None) -> dict[str, int]:
    """Special tokens by what they are for: bos, eos, pad, and the one that closes a turn."""
    roles = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos")}
    roles["end_of_turn"] = end_of_turn if end_of_turn is not None else tokenizer.eos_token_id
    return {role: int(index) for role, index in roles.items() if index is not None}


def marker(tokenizer: Any) -> str:
    """How this vocabulary writes a space before a word: ▁, Ġ or nothing."""
    joined = "".join(tokenizer.tokenize("a a"))
    return joined.removesuffix("a").rpartition("a")[2]


def em(source: Any, pivot: Any, roles: Sequence[tuple[int, int]]) -> Ints:
    """Exact match on bytes; special tokens by role (pairs of source and pivot ids). Shape [source vocabulary]."""
    by_bytes: dict[bytes, int] = {}
    for index, text in enumerate(token_bytes(pivot)):
        if text is not None:
            by_bytes.setdefault(text, index)
    table = np.array([by_bytes.get(text, -1) if text else -1 for text in token_bytes(source)], np.int64)
    for source_id, pivot_id in roles:
        table[source_id] = pivot_id
    return table


def mined(source: Any, pivot: Any, roles: Sequence[tuple[int, int]]) -> Ints:
    """Minimum edit distance (FuseLLM, corrected): every source token -> the pivot token nearest to it, ties to the lowest id."""
    own, theirs = marker(source), marker(pivot)
    raw = [str(token or "") for token in source.convert_ids_to_tokens(list(range(len(source))))]
    names = [token.replace(own, theirs) if own else token for token in raw]
    candidates = [str(token or "") for token in pivot.convert_ids_to_tokens(list(range(len(pivot))))]
    table, _ = nearest(names, candidates)
    for source_id, pivot_id in roles:
        table[source_id] = pivot_id
    return table


def prefix(source: Any, pivot: Any, roles: Sequence[tuple[int, int]]) -> Ints:
    """Every source token -> the pivot token with which the pivot would begin that text.

    An exact match where there is one; else the first token of the pivot's own tokenization; else, for bytes that are no
    text, the longest pivot token they begin with.
    """
    if not pivot.is_fast:
        raise UserError(
            "token_map=prefix asks the pivot's tokenizer for offsets and it is a slow one; use token_map=mined, ms or em"
        )
    table = em(source, pivot, roles)
    by_bytes = {text: index for index, text in reversed(list(enumerate(token_bytes(pivot)))) if text}
    longest = max(map(len, by_bytes))
    pending = [(i, text) for i, text in enumerate(token_bytes(source)) if text and table[i] < 0]
    texts = ["\n" + text.decode("utf-8", "replace") for _, text in pending]
    encodings = pivot(texts, add_special_tokens=False).encodings if texts else []
    pieces = token_bytes(pivot)
    for (index, text), encoding in zip(pending, encodings, strict=True):
        first = next((t for t, (_, end) in zip(encoding.ids, encoding.offsets, strict=True) if end > 1), None)
        piece = pieces[first] if first is not None else None
        if first is not None and piece and text.startswith(piece):
            table[index] = first
        else:
            cut = next((n for n in range(min(longest, len(text)), 0, -1) if text[:n] in by_bytes), 0)
            table[index] = by_bytes[text[:cut]] if cut else -1
    return table


def most_supported(pairs: Ints, counts: Ints, fallback: Ints, pivot_size: int) -> Ints:
    """Mapping statistics (FuseChat v2 as the paper means it): the pivot token most often aligned with a source token.

    pairs: source_id * pivot_size + pivot_id, with counts. Ties go to the lowest id, unseen tokens to ``fallback``.
    """
    table = fallback.copy()
    order = np.lexsort(
        (-(pairs % pivot_size), counts)
    )  # the last write per source id wins: most counted, then lowest id
    table[pairs[order] // pivot_size] = pairs[order] % pivot_size
    return table


def nearest(names: Sequence[str], candidates: Sequence[str]) -> tuple[Ints, Ints]:
    """For each name the candidate of smallest Levenshtein distance (code points), ties to the lowest index; and the distance."""
    exact: dict[str, int] = {}
    for index, candidate in enumerate(candidates):
        exact.setdefault(candidate, index)
    found = np.array([exact.get(name, -1) for name in names], np.int64)
    distance = np.where(found >= 0, 0, -1)
    short = [i for i in np.flatnonzero(found < 0).tolist() if 0 < len(names[i]) <= 64]
    if short:
        alphabet = {
            c: n for n, c in enumerate(sorted({c for text in (*candidates, *(names[i] for i in short)) for c in text}))
        }
        ids = sorted(range(len(candidates)), key=lambda i: (len(candidates[i]), i))
        text, starts = _packed([candidates[i] for i in ids], alphabet)
        name_text, name_starts = _packed([names[i] for i in short], alphabet)
        best, score = np.full(len(short), -1, np.int64), np.full(len(short), 1 << 30, np.int64)
        strings = (name_text, name_starts, text, starts, np.array(ids), len(alphabet))
        parts = threads.count()
        threads.share(lambda first: _nearest(first, parts, best, score, *strings), parts)
        found[short], distance[short] = best, score
    scorer: Any = Levenshtein.distance
    for i in np.flatnonzero(found < 0).tolist():  # longer than a machine word: few, and rapidfuzz handles them
        row = cdist([names[i]], list(candidates), scorer=scorer, dtype=np.int32)[0]
        found[i], distance[i] = int(row.argmin()), int(row.min())
    return found, distance


def _packed(texts: Sequence[str], alphabet: dict[str, int]) -> tuple[npt.NDArray[np.int32], Ints]:
    starts = np.cumsum([0, *map(len, texts)])
    return np.fromiter((alphabet[c] for text in texts for c in text), np.int32, int(starts[-1])), starts


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _nearest(first, step, best, score, names, name_starts, text, starts, ids, alphabet):  # type: ignore[no-untyped-def]
    """Myers' bit-parallel edit distance (1999, Hyyrö's form), candidates visited by difference in length and cut off there."""
    count, total = len(name_starts) - 1, len(ids)
    lengths = starts[1:] - starts[:-1]
    masks = np.zeros(alphabet, np.uint64)
    for n in range(first, count, step):
        begin, size = name_starts[n], name_starts[n + 1] - name_starts[n]
        for k in range(size):
            masks[names[begin + k]] |= np.uint64(1) << np.uint64(k)
        top = np.uint64(1) << np.uint64(size - 1)
        gap = 0
        while gap <= score[n] and (size - gap >= 0 or size + gap <= lengths[total - 1]):
            for side in range(1 if gap == 0 else 2):
                wanted = size - gap if side == 0 else size + gap
                low, high = np.searchsorted(lengths, wanted), np.searchsorted(lengths, wanted, side="right")
                for c in range(low, high):
                    pv, mv, d = ~np.uint64(0), np.uint64(0), size
                    for k in range(starts[c], starts[c + 1]):
                        eq = masks[text[k]]
                        xv = eq | mv
                        xh = (((eq & pv) + pv) ^ pv) | eq
                        ph = mv | ~(xh | pv)
                        mh = pv & xh
                        if ph & top:
                            d += 1
                        elif mh & top:
                            d -= 1
                        ph = (ph << np.uint64(1)) | np.uint64(1)
                        mh = mh << np.uint64(1)
                        pv = mh | ~(xv | ph)
                        mv = ph & xv
                    if d < score[n] or (d == score[n] and ids[c] < best[n]):
                        score[n], best[n] = d, ids[c]
            gap += 1
        for k in range(size):
            masks[names[begin + k]] = np.uint64(0)


def _parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
