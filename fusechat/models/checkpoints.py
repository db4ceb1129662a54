"""Checkpoints read lazily, tensor by tensor, from safetensors (or torch .bin).

No model is ever held in memory: files are mapped, and pages that are done with are let go. `shards` writes them.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusechat.app.checksums import Stream, check_size, digest
from fusechat.app.errors import UserError
from fusechat.models import whole
from fusechat.models.computed import Source

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
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
