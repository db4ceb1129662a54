"""Tokenizers that report no character offsets: which tokens belong to which message is found by tokenizing prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def encode(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int, int]], max_length: int
) -> tuple[Ints, Ints, bool]:
    """ids [T], offsets [T, 2] and whether the text was cut at ``max_length``.

    spans: (message index, first character, end) of the contents. Every token gets the whole piece it lies in as its
    offsets, so that only where turns begin and end is known; a token over a border belongs to the content. Where the
    cut falls into a content, its tokens end where the decoded text does; so does a text's first token.
    """
    tokens = _ids(tokenizer, text)
    offsets = np.zeros((len(tokens), 2), np.int64)
    done = at = 0  # tokens placed, characters they cover
    for _, first, end in spans:
        through = _ids(tokenizer, text[:end])
        begin, stop = _shared(tokens, _ids(tokenizer, text[:first])), _shared(tokens, through)
        if stop < len(through):  # the content's last token is merged with what follows
            stop = min(stop + 1, len(tokens))
        offsets[done:begin] = at, first
        offsets[begin:stop] = first, end
        if begin == 0 < stop:  # a text's first token is predicted by nothing: where it ends is where the rest begins
            offsets[0, 1] = offsets[1:stop, 0] = min(end, first + _decoded(tokenizer, tokens[:1], text[first:end]))
        if begin < max_length < stop:
            offsets[begin:stop, 1] = min(end, first + _decoded(tokenizer, tokens[begin:max_length], text[first:end]))
        done, at = stop, end
    offsets[done:] = at, len(text)
    ids = np.array(tokens, np.int64)
    return ids[:max_length], offsets[:max_length], len(ids) > max_length


def _decoded(tokenizer: Any, kept: list[int], content: str) -> int:
    """How many characters of the content the kept tokens are; the first may hold the space before it, too."""
    leading = len(content) - len(content.lstrip())
    return leading + len(tokenizer.decode(kept).lstrip())


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _shared(left: list[int], right: list[int]) -> int:
    """Length of the common beginning."""
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
