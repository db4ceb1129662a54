"""DistributionStore: one row per chat, as Arrow shards that HF `datasets` opens without our code, plus a manifest.

Crash safety: a shard is written under a temporary name, synced, renamed, and only then recorded beside it with its
checksum; ``manifest.json`` comes last. A directory without it is unfinished and is resumed shard by shard.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from fusechat.app import checksums
from fusechat.app.errors import UserError
from fusechat.app.marks import difference, stamp
from fusechat.app.outputs import MANIFEST, read_json, replace, settled, write_durably, write_json
from fusechat.app.places import CLAIM, claimed
from fusechat.app.sealed import seal
from fusechat.stores.encoding import DECODE, decode_counts

LOG = logging.getLogger(__name__)
COMPANIONS = (CLAIM, "dataset_info.json", "state.json")  # of the shards
NAMES = re.compile(r"data-.*\.arrow|shard-.*\.json|fingerprint|dataset_info\.json|state\.json|manifest\.json|\..*\.tmp")
FORMAT = 3  # of a store's columns
OPEN = 128  # shards of a store that are kept open
Array = npt.NDArray[Any]


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a finished store, or None where there is none."""
    file = path / MANIFEST
    return read_json(file) if file.exists() else None


def is_store(path: Path) -> bool:
    """Whether a folder holds nothing but a store, perhaps an unfinished one that does not say whose it is."""
    return (path / CLAIM).exists() and all(NAMES.fullmatch(file.name) for file in path.iterdir())


def finished(output: Path, mark: str, *, overwrite: bool) -> dict[str, Any] | None:
    """The manifest of a store that is there and fits; None where it is to be made. See `outputs.settled`.

    What a kill has left between the manifest and the end is put right.
    """
    new = output.with_name(f".{output.name}.new")
    if overwrite and (manifest := read_manifest(new)) and manifest["fingerprint"] == mark:
        for record in new.glob("shard-*.json"):
            record.unlink()
        replace(output.resolve(), new)
        return manifest
    found = settled(output / MANIFEST, mark, what="store", keep="output_dir=DIR", overwrite=overwrite)
    for record in output.glob("shard-*.json") if found else ():
        record.unlink()
    return found


class StoreWriter:
    """Writes a store shard by shard; shards may come in any order and from several processes.

    stage: who makes it, for its manifest. overwrite: an unfinished store of other settings is deleted, a finished one
    is replaced when the new one, which grows beside it in ``path``, is whole. Nothing is written before the first
    shard. Raises `UserError` where the directory holds an unfinished store of other settings.
    """

    def __init__(self, output: Path, mark: str, total_shards: int, *, stage: str = "", overwrite: bool = False) -> None:
        self.output, self.mark, self.total, self.stage = output.resolve(), mark, total_shards, stage
        replacing = overwrite and (output / MANIFEST).exists()
        self.path = self.output.with_name(f".{self.output.name}.new") if replacing else self.output
        held = claimed(self.path)
        if held.get("fingerprint", mark) == mark:
            return
        if not overwrite:
            raise UserError(
                f"{output} holds an unfinished store made with other settings ({difference(held, mark)}); "
                "add overwrite=true to replace it, or output_dir=DIR to keep both"
            )
        remove(self.path)

    def begin(self) -> None:
        """Makes the folder and says whose it is. Raises `UserError` where it cannot be written."""
        claim = self.path / CLAIM
        if claim.exists():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            about = {key: value for key, value in stamp(self.mark).items() if key != "fingerprint"}
            write_durably(claim, f"{self.mark}\n{seal(json.dumps({'stage': self.stage, **about}) + chr(10))}".encode())
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); choose another with output_dir=DIR"
            ) from error

    def done(self, index: int) -> dict[str, Any] | None:
        """What is recorded of a shard that is whole (checksum compared), else None: it is to be made again."""
        record = self._record(index)
        if not record.exists():
            return None
        try:
            entry = read_json(record)
            checksums.check(self.path / entry["file"], entry, "made again")
        except UserError as error:
            LOG.warning("%s", error)
            return None
        return entry

    def write(self, index: int, table: pa.Table, statistics: Mapping[str, Any]) -> None:
        """Writes one shard and its record. Raises `UserError` when the disk is full."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        data = sink.getvalue().to_pybytes()
        self.begin()
        name = f"data-{index:05d}-of-{self.total:05d}.arrow"
        try:
            write_durably(self.path / name, data)
        except OSError as error:
            raise UserError(
                f"{self.path / name}: {error.strerror}; the shards written so far are whole: "
                "make room and run the same command again"
            ) from error
        whole = checksums.entry(self.path / name, xxhash.xxh3_128_hexdigest(data))
        self.record(index, {"file": name, "rows": table.num_rows, **whole, "statistics": statistics})

    def record(self, index: int, entry: Mapping[str, Any]) -> None:
        """Notes that a shard is whole: its file, rows, bytes, checksum and statistics."""
        self.begin()
        write_json(self._record(index), entry, sort_keys=True)

    def recorded(self) -> list[dict[str, Any]]:
        """What is recorded of every shard, in order. Raises `UserError` naming the first that is missing."""
        if missing := [i for i in range(self.total) if not self._record(i).exists()]:
            count = f"{len(missing)} shards of {self.path} are missing (first: {missing[0]})"
            raise UserError(f"{count}; run the same command again")
        return [read_json(self._record(i)) for i in range(self.total)]

    def finish(self, **about: Any) -> dict[str, Any]:
        """Writes the files `datasets.load_from_disk` wants, then the manifest; returns the manifest.

        Raises `UserError` where a shard is missing.
        """
        from datasets import DatasetInfo, Features

        entries = self.recorded()
        with pa.memory_map(str(self.path / entries[0]["file"])) as source:
            features = Features.from_arrow_schema(pa.ipc.open_stream(source).schema)
        DatasetInfo(features=features).write_to_directory(str(self.path))
        shards = [{"filename": entry["file"]} for entry in entries]
        state: dict[str, Any] = {"_data_files": shards, "_fingerprint": self.mark}
        state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None}
        state |= {"_output_all_columns": False, "_split": None}
        write_json(self.path / "state.json", state, sort_keys=True)
        files = {name: checksums.entry(self.path / name) for name in COMPANIONS}
        made = {"stage": self.stage} if self.stage else {}
        manifest = {"format": FORMAT, **stamp(self.mark), **made, **about, "shards": entries, "files": files}
        write_json(self.path / MANIFEST, manifest, sort_keys=True)
        for index in range(self.total):
            self._record(index).unlink()
        for stale in self.path.glob(".*.tmp"):  # left by a process that was killed while it wrote
            stale.unlink(missing_ok=True)
        if self.path != self.output:
            replace(self.output, self.path)
        return manifest

    def _record(self, index: int) -> Path:
        return self.path / f"shard-{index:05d}.json"


class DistributionStore:
    """A finished store, memory-mapped. Columns are read as NumPy views: nothing is copied until it is used.

    Raises `UserError` where ``path`` holds no finished store; ``remedy`` is the command that makes it.
    """

    def __init__(self, path: Path | str, remedy: str = "python -m fusechat.extract") -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        if manifest is None:
            state = "is unfinished" if (self.path / CLAIM).exists() else "does not exist"
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
        with pa.memory_map(str(self.path / self.manifest["shards"][shard]["file"])) as file:
            return pa.ipc.open_stream(file).read_all()

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a row, and the row's place there."""
        shard = int(np.searchsorted(self._starts[1:-1], index, side="right"))
        return shard, index - int(self._starts[shard])

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


def list_column(rows: list[Array], dtype: npt.DTypeLike) -> pa.Array:
    """Ragged rows as one Arrow list column of the given item type."""
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    values = np.concatenate([*rows, np.empty(0, dtype)]).astype(dtype, copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _list_views(column: pa.ChunkedArray) -> tuple[Array, Array]:
    chunk = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(chunk, pa.ChunkedArray):  # a table without rows
        return np.zeros(1, np.int32), np.empty(0)
    return chunk.offsets.to_numpy(), chunk.values.to_numpy(zero_copy_only=False)


def remove(path: Path) -> None:
    """Deletes a store, manifest first, claim last: a half-deleted one is never taken for whole."""
    if not (path / CLAIM).exists():
        return
    (path / MANIFEST).unlink(missing_ok=True)
    for file in sorted(path.iterdir(), key=lambda f: f.name == CLAIM):
        file.unlink(missing_ok=True)  # other ranks may do the same
