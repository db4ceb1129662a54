"""Merging: several targets of one shape -> one model, in parameter space. ``from fusechat.merging import merge``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusechat.merging.methods import METHODS
    from fusechat.merging.run import merge

__all__ = ["METHODS", "merge"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for, torch with it, when it is asked for."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("fusechat.merging.methods" if name == "METHODS" else "fusechat.merging.run"), name)
