"""Knowledge in both directions: a server's LLM and clients' models teach each other without private chats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusechat.mutual.rounds import mutual as mutual


def __getattr__(name: str) -> Any:
    if name == "mutual":
        from fusechat.mutual.rounds import mutual

        return mutual
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
