"""The store: what its columns are encoded as, shards from several processes, a full disk, a read-only folder, another
format.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusechat.app.errors import UserError
from fusechat.app.outputs import read_json, write_json
from fusechat.stores import encoding
from fusechat.stores.store import DistributionStore
from fusechat.stores.writer import StoreWriter, finished, list_column


@given(st.integers(0, 10**6), st.integers(2, 12))
def test_uint8_total_variation_error(seed: int, k: int) -> None:
    logprobs = np.sort(np.log(np.random.default_rng(seed).dirichlet(np.full(k + 5, 0.3)) + 1e-9))[::-1][:k].astype(
        np.float32
    )
    for kind, bound in (("uint8", 0.013), ("float16", 0.002)):
        again = encoding.decode_logprobs(encoding.encode_logprobs(logprobs, kind))
        assert 0.5 * np.abs(np.exp(again) - np.exp(logprobs)).sum() <= bound


@given(st.lists(st.integers(1, 5) | st.integers(240, 1100), max_size=40), st.lists(st.booleans(), max_size=40))
def test_boundaries_survive_their_encoding(steps: list[int], inside: list[bool]) -> None:
    boundaries = np.cumsum(steps, dtype=np.int64)
    boundaries[[i for i, hidden in enumerate(inside[: len(steps)]) if hidden]] = -1
    assert encoding.decode_steps(encoding.encode_steps(boundaries)).tolist() == boundaries.tolist()
    mask = boundaries % 2 == 1
    assert encoding.decode_mask(encoding.encode_mask(mask), len(mask)).tolist() == mask.tolist()


@given(st.sets(st.integers(0, 60)))
def test_positions_survive_their_encoding(chosen: set[int]) -> None:
    positions = np.array(sorted(chosen), np.int64)
    assert encoding.decode_runs(encoding.encode_runs(positions)).tolist() == positions.tolist()


@given(st.lists(st.integers(0, 3), max_size=8))
def test_counts_survive_their_encoding(counts: list[int]) -> None:
    stored = encoding.encode_counts(np.array(counts, np.uint16))
    assert encoding.decode_counts(stored, len(counts)).tolist() == counts


def table() -> pa.Table:
    return pa.table({"nats": [1.0, 2.0], "ids": list_column([np.arange(2), np.arange(3)], np.uint16)})


def test_no_manifest_without_every_shard(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, "mark", 2)
    writer.write(0, table(), {})
    with pytest.raises(UserError, match=r"1 shards of .* are missing \(first: 1\); run the same command again"):
        writer.finish()
    writer.write(1, table(), {})
    assert [entry["rows"] for entry in writer.finish()["shards"]] == [2, 2]


def test_a_full_disk_leaves_a_usable_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StoreWriter(tmp_path / "store", "mark", 2)
    writer.write(0, table(), {})

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; the shards written so far are whole"):
        writer.write(1, table(), {})
    monkeypatch.undo()
    assert writer.done(0) is not None
    assert writer.done(1) is None
    assert not list((tmp_path / "store").glob(".*.tmp"))


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(
        UserError, match=r"store cannot be written \(Read-only file system\); choose another with output_dir=DIR"
    ):
        StoreWriter(tmp_path / "store", "mark", 1).begin()


def test_a_store_of_another_format_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, "mark", 1)
    writer.write(0, table(), {})
    writer.finish()
    manifest = tmp_path / "manifest.json"
    write_json(manifest, read_json(manifest) | {"format": 1})
    with pytest.raises(UserError, match=r"is of store format 1, this version reads 3; run: make overwrite=true"):
        DistributionStore(tmp_path, "make")


def rows_of(*lengths: int) -> pa.Table:
    """A shard whose rows hold so many ids."""
    ids = list_column([np.arange(n) for n in lengths], np.uint16)
    return pa.table({"tag": [f"t{n}" for n in lengths], "nats": [float(n) for n in lengths], "ids": ids})


def stored(path: Path, shards: list[list[int]]) -> DistributionStore:
    writer = StoreWriter(path, "mark", len(shards))
    for index, lengths in enumerate(shards):
        writer.write(index, rows_of(*lengths), {})
    writer.finish()
    return DistributionStore(path)


def test_columns_of_any_rows_across_shards(tmp_path: Path) -> None:
    lengths = [3, 0, 2, 5, 1, 4]
    store = stored(tmp_path / "s", [[3], [0, 2, 5], [1, 4]])
    assert store.ranges == [(0, 1), (1, 4), (4, 6)]
    assert store.lengths("ids").tolist() == lengths
    assert store.column("nats").tolist() == lengths
    assert [store.text(row, "tag") for row in range(6)] == [f"t{n}" for n in lengths]
    for first, end in [(0, 6), (0, 1), (1, 3), (2, 5), (5, 6)]:
        assert store.arrow("nats", first, end).to_pylist() == lengths[first:end]


def test_any_number_of_shards_needs_few_mappings_and_no_open_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusechat.stores.store.OPEN", 2)
    store = stored(tmp_path / "s", [[n] for n in range(8)])
    read = [store.row(index, "ids")[0] for index in (5, 0, 7, 3, 5, 1)]
    assert [len(ids) for ids in read] == [5, 0, 7, 3, 5, 1]
    here = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert 2 <= len(here) <= 2 + len(read)  # those kept open, and those that what was read belongs to
    del read
    store.row(2, "ids")
    assert len([line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]) <= 2
    assert not [file for file in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(file)]


def test_a_kill_before_the_records_of_a_replacing_store_went(tmp_path: Path) -> None:
    for path, mark in ((tmp_path / "out", "old"), (tmp_path / ".out.new", "new")):
        writer = StoreWriter(path, mark, 1)
        writer.write(0, table(), {})
        record = (path / "shard-00000.json").read_bytes()
        writer.finish()
    (tmp_path / ".out.new/shard-00000.json").write_bytes(record)
    assert (finished(tmp_path / "out", "new", overwrite=True) or {})["fingerprint"] == "new"
    assert not (tmp_path / ".out.new").exists()
    assert not list((tmp_path / "out").glob("shard-*.json"))
    assert len(DistributionStore(tmp_path / "out")) == 2


def test_a_damaged_truncated_or_missing_shard_is_one_line(tmp_path: Path) -> None:
    StoreWriter(tmp_path, "mark", 1).write(0, table(), {})
    StoreWriter(tmp_path, "mark", 1).finish()
    shard = next(tmp_path.glob("*.arrow"))
    data = shard.read_bytes()
    for content, message in (
        (
            data[:50] + b"x" + data[51:],
            r"damaged or half-written \(xxh3_128 .* expected, .* found\); run: make overwrite",
        ),
        (data[:-8], rf"damaged \({len(data)} bytes expected, {len(data) - 8} found\); run: make overwrite=true"),
    ):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=message):
            DistributionStore(tmp_path, "make").column("nats")
    shard.unlink()
    with pytest.raises(UserError, match="arrow is missing; run: make overwrite=true"):
        DistributionStore(tmp_path, "make").row(0, "ids")
