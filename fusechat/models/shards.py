"""Checkpoints written as a stream of safetensors shards, tensor by tensor: no model is ever held in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128

from fusechat.app.errors import UserError
from fusechat.models.checkpoints import DTYPES, INDEX, SINGLE

NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
