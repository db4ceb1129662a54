"""Alignment: a source's distributions brought onto the pivot's tokens, without a neural network in sight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusechat.align.stage import align as align


def __getattr__(name: str) -> Any:
    if name == "align":
        from fusechat.align.stage import align

        return align
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
