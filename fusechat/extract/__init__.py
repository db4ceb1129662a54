"""Extraction: chats and a source -> its next-token distributions, stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusechat.extract.stage import extract as extract


def __getattr__(name: str) -> Any:
    if name == "extract":
        from fusechat.extract.stage import extract

        return extract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
