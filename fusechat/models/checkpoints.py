"""Checkpoints read lazily, tensor by tensor, from safetensors (or torch .bin).

No model is ever held in memory: files are mapped, and pages that are done with are let go. `shards` writes them.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

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
        names = whole.weight_files(self.path)
        if not names:
            raise UserError(
                f"{path} holds no model ({SINGLE} or {INDEX} expected); give a Hugging Face model directory"
            )
        held: dict[Path, Iterable[str]] = {}
        for file in (self.path / name for name in names):
            if file.suffix == ".bin":
                held[file] = tensors = _pickled(file)
                self._bin |= tensors
            else:
                infos, head = _opened(file)
                held[file] = infos
                self.infos |= infos
                self._streams[file] = Stream(file, head, whole.judge)
        _check_once(held)
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


def check_shards(path: Path) -> None:
    """Raises `UserError` where a tensor stands in two of the files that a model's weights are taken from."""
    files = [path / name for name in whole.weight_files(path)] if path.is_dir() else []
    if len(files) > 1:
        _check_once({file: _pickled(file) if file.suffix == ".bin" else _header(file)[0] for file in files})


def _check_once(held: Mapping[Path, Iterable[str]]) -> None:
    """Raises `UserError` for the first tensor of two files: which of the two counts would be chance."""
    first: dict[str, Path] = {}
    for file, names in held.items():
        for name in sorted(names):
            if name in first:
                raise UserError(f"{name} is in {first[name]} and in {file}; copy or download the model again")
            first[name] = file


def _pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file. weights_only: a pickle from a stranger must not run code."""
    whole.judge(file, digest(file))
    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{file} cannot be read as tensors ({reason:.200}); copy it again, or save it as safetensors"
        ) from error
    if not isinstance(held, dict) or not all(isinstance(tensor, Tensor) for tensor in held.values()):
        raise UserError(f"{file} holds more than tensors by name; save the model with save_pretrained")
    return held


def read_header(file: Path) -> dict[str, TensorInfo]:
    """What a safetensors file holds. Raises `UserError` where it is broken."""
    return _opened(file)[0]


def _opened(file: Path) -> tuple[dict[str, TensorInfo], bytes]:
    """What a file holds, and the bytes that say so."""
    listed, remedy = whole.recorded(file.parent)
    check_size(file, listed.get(file.name, {}), remedy)
    entries, head = _header(file)
    if strange := next((name for name, entry in entries.items() if entry["dtype"] not in DTYPES), None):
        kind = entries[strange]["dtype"]
        raise UserError(
            f"{file}: {strange} is {kind}, no {', '.join(DTYPES)}; give the model as it was before it was quantised"
        )
    infos = {
        name: TensorInfo(tuple(e["shape"]), DTYPES[e["dtype"]], file, len(head) + e["data_offsets"][0])
        for name, e in entries.items()
    }
    return infos, head


def _header(file: Path) -> tuple[dict[str, Any], bytes]:
    """A file's tensors as its header describes them, and its bytes up to their data."""
    try:
        with safe_open(file, framework="np"):  # the library's own check that header and length fit
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(begin := stream.read(8), "little")
            header = json.loads(text := stream.read(length))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{file} is truncated or not safetensors ({error}); copy it again") from error
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, begin + text
