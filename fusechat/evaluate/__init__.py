"""Evaluation that compares models of different tokenizers fairly, sample by sample, resumable."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusechat.evaluate.stage import EVALUATIONS, evaluate, evaluate_by

__all__ = ["EVALUATIONS", "evaluate", "evaluate_by"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fusechat.evaluate import stage

    return getattr(stage, name)
