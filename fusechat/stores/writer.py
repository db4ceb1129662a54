"""Writing a store: shards, records, and the manifest that makes them one.

Crash safety: a shard is written under a temporary name, synced, renamed, and only then recorded beside it with its
checksum; ``manifest.json`` comes last. A directory without it is unfinished and is resumed shard by shard.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from fusechat.app import checksums
from fusechat.app.errors import UserError
from fusechat.app.marks import difference, stamp
from fusechat.app.outputs import MANIFEST, read_json, replace, settled, write_durably, write_json
from fusechat.app.places import CLAIM, claimed
from fusechat.app.sealed import seal
from fusechat.app.states import NEXT_STORE
from fusechat.stores.store import FORMAT, Array, read_manifest

LOG = logging.getLogger(__name__)
COMPANIONS = (CLAIM, "dataset_info.json", "state.json")  # of the shards
NAMES = re.compile(r"data-.*\.arrow|shard-.*\.json|fingerprint|dataset_info\.json|state\.json|manifest\.json|\..*\.tmp")


def is_store(path: Path) -> bool:
    """Whether a folder holds nothing but a store, perhaps an unfinished one that does not say whose it is."""
    return (path / CLAIM).exists() and all(NAMES.fullmatch(file.name) for file in path.iterdir())


def finished(output: Path, mark: str, *, overwrite: bool) -> dict[str, Any] | None:
    """The manifest of a store that is there and fits; None where it is to be made. See `outputs.settled`.

    What a kill has left between the manifest and the end is put right.
    """
    new = output.with_name(NEXT_STORE.format(output.name))
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
        self.path = self.output.with_name(NEXT_STORE.format(self.output.name)) if replacing else self.output
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


def list_column(rows: list[Array], dtype: npt.DTypeLike) -> pa.Array:
    """Ragged rows as one Arrow list column of the given item type."""
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    values = np.concatenate([*rows, np.empty(0, dtype)]).astype(dtype, copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def remove(path: Path) -> None:
    """Deletes a store, manifest first, claim last: a half-deleted one is never taken for whole."""
    if not (path / CLAIM).exists():
        return
    (path / MANIFEST).unlink(missing_ok=True)
    for file in sorted(path.iterdir(), key=lambda f: f.name == CLAIM):
        file.unlink(missing_ok=True)  # other ranks may do the same
