"""What a training reads: the pivot's distributions and the aligned ones, which belong together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusechat.app.errors import UserError
from fusechat.stores.store import DistributionStore


def open_stores(pivot: Path, aligned: Sequence[Path], remedies: Sequence[str] = ()) -> list[DistributionStore]:
    """The pivot's distributions and what was aligned to them, in this order. remedies: the command that makes each.

    Raises `UserError` with the command to run where a store is missing, unfinished or made from something else.
    """
    commands = [*remedies] or ["python -m fusechat.extract", *["python -m fusechat.align"] * len(aligned)]
    stores = [DistributionStore(path, remedy) for path, remedy in zip([pivot, *aligned], commands, strict=True)]
    first = stores[0]
    for store, remedy in zip(stores[1:], commands[1:], strict=True):
        again = f"run: {remedy} overwrite=true"
        if store.manifest["pivot"] != first.fingerprint:
            raise UserError(f"{store.path} was aligned with other pivot distributions than {first.path}; {again}")
        if len(store) != len(first):
            raise UserError(f"{store.path} has {len(store)} chats where {first.path} has {len(first)}; {again}")
    return stores
