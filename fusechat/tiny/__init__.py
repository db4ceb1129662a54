"""The tiny world: generated chats and small LLMs trained on them: everything runs without a hub or a GPU."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusechat.tiny.stage import make

__all__ = ["make"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fusechat.tiny import stage

    return getattr(stage, name)
