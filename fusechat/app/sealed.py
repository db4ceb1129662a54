"""JSON objects that carry their own checksum, as first key: of every byte that follows it.

Any reader of JSON opens them; ours compares. Without one they are of an older version, and are taken as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from fusechat.app.errors import UserError

ALGORITHM = "xxh3_128"  # finds damage, not malice, at the speed of memory
HEAD = b'{"checksum": "xxh3_128:'
DIGITS = 32
AGAIN = "run the command that made it again with overwrite=true"


def seal(text: str) -> str:
    """The text of a JSON object with its checksum."""
    rest = '"' + ("" if text.startswith("{}") else ",") + text[1:]
    return HEAD.decode() + xxhash.xxh3_128_hexdigest(rest.encode()) + rest


def unsealed(data: bytes, name: Path | str, remedy: str = AGAIN) -> Any:
    """The content of a sealed JSON object, its checksum left out, or of any JSON without one.

    Raises `UserError` with ``name`` where it is damaged, cut short, or no JSON.
    """
    head, rest = data[: len(HEAD)], data[len(HEAD) + DIGITS :]
    if head == HEAD:
        expected = data[len(HEAD) : len(HEAD) + DIGITS].decode(errors="replace")
        compare(name, xxhash.xxh3_128_hexdigest(rest), expected, remedy)
    elif b'"checksum' in head or b"xxh3_128" in head:  # no single byte hides both
        raise UserError(f"{name} is damaged (its checksum cannot be read); {remedy}")
    try:
        content = json.loads(data)
    except ValueError as error:
        raise UserError(f"{name} is half-written or not JSON; {remedy}") from error
    if head == HEAD:
        del content["checksum"]
    return content


def compare(name: Path | str, found: str, expected: str, remedy: str = AGAIN, algorithm: str = ALGORITHM) -> None:
    """Raises `UserError` where two hashes of one content differ."""
    if found != expected:
        raise UserError(f"{name} is damaged or half-written ({algorithm} {expected} expected, {found} found); {remedy}")
