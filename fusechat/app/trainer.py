"""A quiet Lightning Trainer from plain options, and seeds. Knows no config; lightning is imported when called."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

NOISE = (".*does not have many workers.*", ".*`IterableDataset` has `__len__`.*", ".*LeafSpec.*")


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch, DataLoader workers included."""
    import lightning

    lightning.seed_everything(seed, workers=True, verbose=False)


def quiet_trainer(options: Mapping[str, Any], callbacks: Sequence[Any], logger: Any = False) -> Any:
    """`lightning.Trainer` with these options of its own, without its chatter."""
    import lightning

    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)  # set here: lightning sets its own level when imported
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    return lightning.Trainer(**options, callbacks=list(callbacks), logger=logger)
