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


def json_rows(path: Path) -> tuple[list[Any], bool]:
    """The values of a JSON list or of JSON lines, and whether it is a list. Raises `UserError` with the broken line.

    Lines end at ``\\n`` alone: JSON strings may hold U+2028. Empty ones are passed over.
    """
    text = text_of(path)
    if text.lstrip().startswith("["):
        return _loads(text, path, 1), True
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_loads(line, path, number) for number, line in numbered], False


def _loads(text: str, path: Path, first: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = first + (error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0)
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{path}, line {line}: not JSON ({reason}); mend or remove the line") from error
