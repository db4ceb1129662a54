"""Publishing: a finished model to the Hub."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusechat.publish.stage import publish

__all__ = ["publish"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fusechat.publish import stage

    return getattr(stage, name)
