"""Results: tables, intervals, figures and one page."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusechat.report.stage import compare, report

__all__ = ["compare", "report"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fusechat.report import stage

    return getattr(stage, name)
