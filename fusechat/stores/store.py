"""DistributionStore: one row per chat, as Arrow shards that HF `datasets` opens without our code, plus a manifest."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fusechat.app import checksums
from fusechat.app.errors import UserError
from fusechat.app.outputs import MANIFEST, read_json
from fusechat.app.places import CLAIM
from fusechat.stores.encoding import DECODE, decode_counts

FORMAT = 3  # of a store's columns
OPEN = 128  # shards of a store that are kept open
Array = npt.NDArray[Any]


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a finished store, or None where there is none."""
    file = path / MANIFEST
    return read_json(file) if file.exists() else None


class DistributionStore:
    """A finished store, memory-mapped. Columns are read as NumPy views: nothing is copied until it is used.

    Raises `UserError` where ``path`` holds no finished store; ``remedy`` is the command that makes it.
    """

    def __init__(self, path: Path | str, remedy: str = "python -m fusechat.extract") -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        if manifest is None:
            state = "is unfinished" if (self.path / CLAIM).exists() else "does not exist"
            if (self.path / "config.json").exists():
                raise UserError(f"{self.path} is a model, no store of distributions; make one with: {remedy}")
            raise UserError(f"the store {self.path} {state}; make it with: {remedy}")
        if manifest["format"] != FORMAT:
            made = f"{self.path} is of store format {manifest['format']}, this version reads {FORMAT}"
            raise UserError(f"{made}; run: {remedy} overwrite=true")
        self.manifest: dict[str, Any] = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.remedy, self.verified = f"run: {remedy} overwrite=true", False
        for name, expected in manifest.get("files", {}).items():
            checksums.check(self.path / name, expected, self.remedy)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self._shard(0)[0].column_names)

    def verify(self) -> None:
        """Compares every shard with its checksum. Raises `UserError` naming the first that differs."""
        for entry in self.manifest["shards"]:
            checksums.check(self.path / entry["file"], entry, self.remedy)
        self.verified = True

    def row(self, index: int, *columns: str) -> tuple[Array, ...]:
        """The named list columns of one row: NumPy views of the memory-mapped file, decoded as `DECODE` says."""
        shard, local = self._place(index)
        _, views = self._shard(shard)
        found = {c: views[c][1][views[c][0][local] : views[c][0][local + 1]] for c in columns}
        if "counts" in found:
            starts = views["gold_logprob"][0]
            found["counts"] = decode_counts(found["counts"], int(starts[local + 1] - starts[local]))
        return tuple(DECODE[name](values) if name in DECODE else values for name, values in found.items())

    def column(self, name: str) -> Array:
        """A whole column of numbers, as one array."""
        return np.concatenate([self.arrow(name, *rows).to_numpy() for rows in self.ranges])

    def lengths(self, name: str) -> npt.NDArray[np.int64]:
        """How many items each row of a list column holds, as stored."""
        parts = [pc.list_value_length(self.arrow(name, *rows)).to_numpy() for rows in self.ranges]
        return np.concatenate(parts).astype(np.int64)

    def text(self, index: int, name: str) -> str:
        """One row of a column of strings."""
        shard, local = self._place(index)
        return str(self._shard(shard)[0].column(name)[local].as_py())

    @cached_property
    def ranges(self) -> list[tuple[int, int]]:
        """First row and end of each shard."""
        return [*pairwise(self._starts.tolist())]

    def arrow(self, name: str, first: int, end: int) -> pa.ChunkedArray:
        """A column of the rows from ``first`` to ``end``, as it is stored.

        Files are mapped anew for it and let go with it: a pass over a store, range by range, leaves no page resident.
        """
        (shard, skipped), last = self._place(first), self._place(end - 1)[0]
        parts = [self._open(i).column(name) for i in range(shard, max(shard, last) + 1)]
        chunks = [chunk for part in parts for chunk in part.chunks]
        return pa.chunked_array(chunks, parts[0].type).slice(skipped, end - first)

    def gold(self, index: int) -> npt.NDArray[np.int64]:
        """The gold tokens of one row: what each of its positions predicts."""
        ids, positions = self.row(index, "input_ids", "positions")
        tokens: npt.NDArray[np.int64] = ids[positions.astype(np.int64) + 1].astype(np.int64)
        return tokens

    @cached_property
    def ends(self) -> npt.NDArray[np.int64]:
        """Where each chat's predictions end, in bytes of assistant text; see `Rendered.end`."""
        return self.column("end").astype(np.int64)

    def _open(self, shard: int) -> pa.Table:
        """A shard, mapped as long as the table is held; its file is closed: no store is too large for ``ulimit -n``.

        Raises `UserError` where any shard of the store is missing or damaged.
        """
        if not self.verified:
            self.verify()
        with pa.memory_map(str(self.path / str(self._files[shard]))) as file:
            return pa.ipc.open_stream(file).read_all()

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a row, and the row's place there."""
        shard = int(np.searchsorted(self._starts[1:-1], index, side="right"))
        return shard, index - int(self._starts[shard])

    @cached_property
    def _files(self) -> npt.NDArray[np.str_]:
        """The shards' files: an array, as a look at Python's objects counts references and copies a worker's pages."""
        return np.array([entry["file"] for entry in self.manifest["shards"]])

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(entry["rows"] for entry in self.manifest["shards"])])

    @cached_property
    def _shard(self) -> Callable[[int], tuple[pa.Table, dict[str, tuple[Array, Array]]]]:
        """A shard by its number, and offsets and items of its list columns; the last `OPEN` are kept.

        So neither memory nor the number of mappings grows with the number of shards.
        """

        def shard(number: int) -> tuple[pa.Table, dict[str, tuple[Array, Array]]]:
            table = self._open(number)
            lists = (field.name for field in table.schema if pa.types.is_list(field.type))
            return table, {name: _list_views(table.column(name)) for name in lists}

        return lru_cache(OPEN)(shard)

    def __getstate__(self) -> dict[str, Any]:  # DataLoader workers map the files again rather than copy them
        return {name: getattr(self, name) for name in ("path", "manifest", "fingerprint", "remedy", "verified")}


def _list_views(column: pa.ChunkedArray) -> tuple[Array, Array]:
    chunk = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(chunk, pa.ChunkedArray):  # a table without rows
        return np.zeros(1, np.int32), np.empty(0)
    return chunk.offsets.to_numpy(), chunk.values.to_numpy(zero_copy_only=False)
