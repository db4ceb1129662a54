"""Judging: answers -> grades by a language model behind an OpenAI-compatible endpoint."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusechat.judge.stage import judge

__all__ = ["judge"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fusechat.judge import stage

    return getattr(stage, name)
