"""What a tokenizer's ids stand for: bytes, special tokens by role, and how a space is written.

All of it is read from the tokenizer's own decoder, so that no list of tokenizer classes is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """What every id stands for in a text, as bytes; None for special tokens and ids without a token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if not tokenizer.is_fast:
        return _slow_bytes(tokenizer, tokens)
    decoder = _parts(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
    added = {index: str(token.content) for index, token in tokenizer.added_tokens_decoder.items()}
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    byte_level = any(part["type"] == "ByteLevel" for part in decoder)
    spaces = [p["pattern"]["String"] for p in decoder if p["type"] == "Replace" and p["content"] == " "]
    spaces += [p["replacement"] for p in decoder if p["type"] == "Metaspace"]

    def of(index: int, token: str | None) -> bytes | None:
        if token is None or index in special:
            return None
        if index in added:
            return added[index].encode()
        if byte_level:
            return bytes(to_byte[c] for c in token) if all(c in to_byte for c in token) else token.encode()
        if byte := BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        for mark in spaces:
            token = token.replace(mark, " ")
        return token.encode()

    return [of(index, token) for index, token in enumerate(tokens)]


def written(tokenizer: Any) -> dict[bytes, int]:
    """The id that writes each text: a byte's token (``<0x2E>``) only where no other has that text, then the lowest id.

    A vocabulary with bytes as a last resort has two tokens for ``.`` and every other character of one byte.
    """
    names = token_names(tokenizer)
    texts = [(index, text) for index, text in enumerate(token_bytes(tokenizer)) if text]
    texts.sort(key=lambda pair: BYTE_TOKEN.fullmatch(names[pair[0]]) is not None)
    found: dict[bytes, int] = {}
    for index, text in texts:
        found.setdefault(text, index)
    return found


def _slow_bytes(tokenizer: Any, tokens: Sequence[str | None]) -> list[bytes | None]:
    """A slow tokenizer has no decoder to read: each token's own string; bytes that are no text alone come out empty."""
    special = set(tokenizer.all_special_ids)

    def of(index: int, token: str | None) -> bytes | None:
        if token is None or index in special:
            return None
        text = str(tokenizer.convert_tokens_to_string([token]))
        lost_space = token.startswith("▁") and not text.startswith(" ")  # a text's first word loses it
        return (" " * lost_space + text).encode()

    return [of(index, token) for index, token in enumerate(tokens)]


def token_names(tokenizer: Any) -> list[str]:
    """Every id's token as the vocabulary writes it, markers and all; empty for ids without a token."""
    return [str(token or "") for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]


def special_roles(tokenizer: Any, end_of_turn: int | None = None) -> dict[str, int]:
    """Special tokens by what they are for: bos, eos, and the one that closes a turn."""
    roles = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos")}
    roles["end_of_turn"] = end_of_turn if end_of_turn is not None else tokenizer.eos_token_id
    return {role: int(index) for role, index in roles.items() if index is not None}


def marker(tokenizer: Any) -> str:
    """How this vocabulary writes a space before a word: ▁, Ġ or nothing."""
    joined = "".join(tokenizer.tokenize("a a"))
    return joined.removesuffix("a").rpartition("a")[2]


def _parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a fast tokenizer's decoder."""
    if decoder is None:
        return []
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
