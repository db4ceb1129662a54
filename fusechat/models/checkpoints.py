"""Checkpoints tensor by tensor: read lazily from safetensors (or torch .bin), written as a stream of shards.

Neither side ever holds a model in memory: files are mapped, and pages that are done with are let go. Writing goes to a
temporary directory that takes its name at the end.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from xxhash import xxh3_128

from fusechat.app.checksums import Stream, check_size, digest
from fusechat.app.errors import UserError
from fusechat.models import whole
from fusechat.models.computed import Source

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor is without reading it. start: byte offset of its data in ``file`` (-1 for .bin checkpoints)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    start: int

    @property
    def bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class LazyCheckpoint:
    """Read access to the tensors of a model directory by name, their files' checksums taken on the way.

    Raises `UserError` for a missing or truncated file; see `verify` for a damaged one.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.infos: dict[str, TensorInfo] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._bin: dict[str, Tensor] = {}
        self._streams: dict[Path, Stream] = {}
        whole.check_model(self.path, weights=False)
        for file in _weight_files(self.path):
            if file.suffix == ".bin":  # weights_only: a pickle from a stranger must not run code
                whole.judge(file, digest(file))
                self._bin |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            else:
                infos, head = _opened(file)
                self.infos |= infos
                self._streams[file] = Stream(file, head, whole.judge)
        self.infos |= {name: TensorInfo(tuple(t.shape), t.dtype, self.path, -1) for name, t in self._bin.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def tensor(self, name: str) -> Tensor:
        """The tensor, memory-mapped where the format allows. The file does not change whatever is written to it."""
        if name in self._bin:
            return self._bin[name]
        return self.at(self.infos[name])

    def at(self, info: TensorInfo) -> Tensor:
        """The tensor at a place in a safetensors file."""
        if not info.bytes:
            return torch.empty(info.shape, dtype=info.dtype)
        count = info.bytes // info.dtype.itemsize
        flat = torch.frombuffer(self._map(info.file), dtype=info.dtype, count=count, offset=info.start)
        return flat.view(info.shape)

    def source(self, name: str) -> Source:
        """The tensor, or how its rows are computed, for those who read it a part at a time."""
        return self.tensor(name)

    def verify(self) -> None:
        """Compares the checksums of all files; what was not let go is read. Raises `UserError` for a damaged one."""
        for stream in self._streams.values():
            stream.finish()

    def read_ahead(self, name: str) -> None:
        """Asks the kernel to have the tensor's pages in memory soon."""
        self._advise("MADV_WILLNEED", name)

    def let_go(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Tells the kernel that elements [start, stop) need not stay mapped; whoever reads them again gets them again.

        Of .bin checkpoints everything that was read stays mapped.
        """
        self._advise("MADV_DONTNEED", name, start, stop)

    def _advise(self, advice: str, name: str, start: int = 0, stop: int | None = None) -> None:
        info = self.infos[name]
        if info.start < 0 or not info.bytes or not hasattr(mmap, advice):
            return
        size = info.dtype.itemsize
        begin = info.start + start * size
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        last = info.start + (info.bytes if stop is None else stop * size)
        if advice == "MADV_DONTNEED" and (stream := self._streams.get(info.file)):
            with memoryview(self._map(info.file)) as pages:  # the checksum, while they are in the cache
                stream.feed(begin, pages[begin:last])
        self._map(info.file).madvise(getattr(mmap, advice), first, last - first)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


class CheckpointWriter:
    """Streams tensors of known shapes into safetensors shards with an index, in the order of ``plan``.

    plan: name -> (shape, dtype). Tensors must be given in the plan's order; a tensor may be given in slices of rows.
    """

    def __init__(
        self, path: Path, plan: Mapping[str, tuple[tuple[int, ...], torch.dtype]], max_shard_size: int
    ) -> None:
        self.path, self.plan = path, dict(plan)
        self.shards = _shards(self.plan, max_shard_size)
        self.total = sum(_size(*entry) for entry in self.plan.values())
        self._queue = iter([(shard, name) for shard in range(len(self.shards)) for name in self.shards[shard]])
        self._current: tuple[int, str] | None = None
        self._left = 0
        self._file: Any = None
        self._hash: Any = None
        self.digests: dict[str, str] = {}  # file -> xxh3_128, of the shards that are ended

    def write(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor, or the next rows of the one being written."""
        if self._left == 0:
            self._advance(name)
        assert self._current is not None and self._current[1] == name, f"{name} is out of the plan's order"
        data = tensor.to(self.plan[name][1]).cpu().contiguous()
        self._left -= data.numel() * data.element_size()
        assert self._left >= 0, f"{name}: more rows than planned"
        self._append(data.view(-1).view(torch.uint8).numpy().data)

    def close(self) -> list[Path]:
        """Ends the last shard and writes the index; returns the files."""
        self._end_shard()
        assert self._left == 0 and next(self._queue, None) is None, "tensors of the plan are missing"
        names = [self._shard_name(i) for i in range(len(self.shards))]
        if len(names) > 1:
            where = {name: names[i] for i, shard in enumerate(self.shards) for name in shard}
            content = {"metadata": {"total_size": self.total}, "weight_map": where}
            (self.path / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        return [self.path / name for name in names]

    def _advance(self, name: str) -> None:
        shard, expected = next(self._queue)
        if self._current is None or self._current[0] != shard:
            self._end_shard()
            self._file = (self.path / self._shard_name(shard)).open("wb", buffering=1 << 20)
            self._hash = xxh3_128()
            self._append(_header({key: self.plan[key] for key in self.shards[shard]}))
        self._current, self._left = (shard, expected), _size(*self.plan[expected])

    def _append(self, data: Any) -> None:
        self._hash.update(data)
        self._file.write(data)

    def _end_shard(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            assert self._current is not None
            self.digests[self._shard_name(self._current[0])] = self._hash.hexdigest()

    def _shard_name(self, index: int) -> str:
        count = len(self.shards)
        return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def bytes_of(text: str | int) -> int:
    """``5GB``, ``200MB`` or a number, in bytes (decimal units, as transformers reads ``max_shard_size``)."""
    number, factor = str(text).strip(), 1
    for unit, size in {"GB": 10**9, "MB": 10**6, "KB": 10**3}.items():
        if number.upper().endswith(unit):
            number, factor = number[: -len(unit)], size
    try:
        found = int(float(number) * factor)
    except (ValueError, OverflowError) as error:
        raise UserError(f"max_shard_size={text!r} is not a size; write 5GB, 200MB or a number of bytes") from error
    if found <= 0:
        raise UserError(f"max_shard_size={text!r} holds nothing; write 5GB, 200MB or a number of bytes")
    return found


def _shards(plan: Mapping[str, tuple[tuple[int, ...], torch.dtype]], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in plan.items():
        if shards[-1] and filled + _size(*entry) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _size(*entry)
    return shards


def _header(plan: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> bytes:
    """A safetensors file up to its data: 8 bytes of length, then JSON padded to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in plan.items():
        end = at + _size(shape, dtype)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return int(torch.Size(shape).numel()) * dtype.itemsize


def _weight_files(path: Path) -> list[Path]:
    for single, index in ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (path / index).exists():
            names = sorted(set(json.loads((path / index).read_text())["weight_map"].values()))
            if absent := [name for name in names if not (path / name).exists()]:
                raise UserError(f"{path / index} names {absent[0]}, which is missing; copy the model again")
            return [path / name for name in names]
        if (path / single).exists():
            return [path / single]
    raise UserError(f"{path} holds no model ({SINGLE} or {INDEX} expected); give a Hugging Face model directory")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """What a safetensors file holds. Raises `UserError` where it is broken."""
    return _opened(file)[0]


def _opened(file: Path) -> tuple[dict[str, TensorInfo], bytes]:
    """What a file holds, and the bytes that say so."""
    listed, remedy = whole.recorded(file.parent)
    check_size(file, listed.get(file.name, {}), remedy)
    try:
        with safe_open(file, framework="np"):  # the library's own check that header and length fit
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(begin := stream.read(8), "little")
            header = json.loads(text := stream.read(length))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{file} is truncated or not safetensors ({error}); copy it again") from error
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    infos = {
        name: TensorInfo(tuple(e["shape"]), DTYPES[e["dtype"]], file, 8 + length + e["data_offsets"][0])
        for name, e in entries.items()
    }
    return infos, begin + text
