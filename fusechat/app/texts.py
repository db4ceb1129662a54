"""Text files that people bring: UTF-8, as JSON lines or one JSON document. What is broken is told with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError


def text_of(path: Path) -> str:
    """A file's text, without a byte order mark. Raises `UserError` with the line of the first byte that is no UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise UserError(f"{path}, line {line}: byte 0x{byte:02x} is no UTF-8; save the file as UTF-8") from error


def json_object(path: Path) -> dict[str, Any]:
    """What a file of settings holds. Raises `UserError` where that is no JSON object."""
    try:
        content = json.loads(text_of(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object ({content!r:.60}); copy or download it again")
    return content


def json_rows(path: Path) -> tuple[list[Any], bool]:
    """The values of a JSON list or of JSON lines, and whether it is a list. Raises `UserError` with the broken line.

    Lines end at ``\\n`` alone: JSON strings may hold U+2028. Empty ones are passed over. One object may take several.
    """
    text = text_of(path)
    if text.lstrip().startswith("["):
        return _loads(text, path, None), True
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(numbered) > 1 and _is_one(text):
        return [_loads(text, path, None)], False
    return [_loads(line, path, number) for number, line in numbered], False


def _is_one(text: str) -> bool:
    try:
        return bool(json.loads(text))
    except (ValueError, RecursionError):
        return False


def _loads(text: str, path: Path, first: int | None) -> Any:
    """The value, with no key twice and no character in halves, of which libraries make different things."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        line, reason = first, str(error)
        if isinstance(error, json.JSONDecodeError):
            line, reason = (first or 1) + error.lineno - 1, error.msg
        elif isinstance(error, UnicodeEncodeError):
            reason = f"\\u{ord(error.object[error.start]):04x} is half a character"
        where = f"{path}, line {line}: " if line else f"{path}: "
        raise UserError(f"{where}not JSON ({reason}); mend or remove {'the line' if line else 'it'}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held: dict[str, Any] = {}
    for key, value in pairs:
        if key in held:
            raise ValueError(f"the key {key!r} twice, with {held[key]!r:.60} and {value!r:.60}")
        held[key] = value
    return held
