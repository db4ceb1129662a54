"""Fusion: train a target from the pivot's weights on what the sources know.

    from fusechat.fusion import FusionLoss, FusionRule, train

Importing this package brings no torch; what it offers is imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusechat.fusion.losses import LOSSES, FusionLoss
    from fusechat.fusion.options import Callbacks, Data, Optimizer
    from fusechat.fusion.rules import RULES, FusionRule
    from fusechat.fusion.run import train

__all__ = ["LOSSES", "RULES", "Callbacks", "Data", "FusionLoss", "FusionRule", "Optimizer", "train"]
HOMES = {"LOSSES": "losses", "FusionLoss": "losses", "RULES": "rules", "FusionRule": "rules"}
HOMES |= {"Callbacks": "options", "Data": "options", "Optimizer": "options", "train": "run"}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
