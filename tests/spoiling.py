"""Stores made wrong on purpose, manifests and checksums right."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fusechat.stores.store import DistributionStore
from fusechat.stores.writer import StoreWriter


def spoil(path: Path, change: Callable[[pa.Table], pa.Table], **about: Any) -> None:
    """Rewrites a store's first shard, records and all."""
    store = DistributionStore(path)
    first, *rest = (pa.table({name: store.arrow(name, *rows) for name in store.columns}) for rows in store.ranges)
    tables = [change(first), *rest]
    shutil.rmtree(path)
    writer = StoreWriter(path, store.fingerprint, len(tables))
    for index, (table, entry) in enumerate(zip(tables, store.manifest["shards"], strict=True)):
        writer.write(index, table, entry["statistics"])
    writer.finish(**{k: v for k, v in store.manifest.items() if k not in ("format", "fingerprint", "shards")} | about)


def replaced(table: pa.Table, name: str, value: float) -> pa.Table:
    """The column with the given value in all its entries."""
    old = table.column(name).combine_chunks()
    new = pa.ListArray.from_arrays(old.offsets, pa.array(np.full(len(old.values), value, old.values.to_numpy().dtype)))
    return table.set_column(table.column_names.index(name), name, new)
