"""Delta store: a target kept as pivot + low-rank delta of mixed precision (Delta-CoMe, arXiv 2406.08903), without the GPTQ step.

Every weight matrix of a block: delta = U S V by SVD; the first 2 singular vectors at 8 bits, the next 32 at 3, the rest at
2 as far as the budget of 16 * ratio bits per element goes; round-to-nearest in groups of 128, S unquantised. Other
parameters are kept as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.merging.varm import BLOCK
from fusechat.models.checkpoints import LazyCheckpoint, TensorInfo
from fusechat.models.load import model_identity

FILE, RECORD = "delta.safetensors", "delta.json"
GROUP = 128
RANKS = ((8, 2), (3, 32))  # (bits, singular vectors); the rest of the budget goes to 2 bits


def ranks_of(shape: tuple[int, ...], ratio: float) -> list[tuple[int, int]]:
    """(bits, vectors) for a matrix: sum of vectors * bits * (m + n) is about 16 * ratio * m * n bits."""
    m, n = shape
    budget, left = 16 * ratio * m * n / (m + n), min(m, n)
    found = []
    for bits, wanted in RANKS:
        count = min(left, wanted, int(budget // bits))
        budget, left = budget - bits * count, left - count
        found.append((bits, count))
    return [*found, (2, min(left, int(budget // 2)))]


def quantize(vectors: Tensor, bits: int) -> dict[str, Tensor]:
    """Rows of ``vectors`` [R, C] in groups of 128, min to max: packed codes, fp16 scale and offset per group."""
    padded = torch.nn.functional.pad(vectors, (0, -vectors.shape[1] % GROUP)).view(vectors.shape[0], -1, GROUP)
    low = padded.amin(-1, keepdim=True).half().float()
    scale = ((padded.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float().clamp_min(6e-8)
    codes = ((padded - low) / scale).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    flat: npt.NDArray[np.uint8] = codes.numpy().reshape(-1)
    packed = np.packbits(np.unpackbits(flat[:, None], axis=1)[:, 8 - bits :])
    return {"codes": torch.from_numpy(packed), "scale": scale.squeeze(-1).half(), "low": low.squeeze(-1).half()}


def dequantize(stored: dict[str, Tensor], bits: int, columns: int) -> Tensor:
    """The inverse of `quantize`: [R, columns] in fp32."""
    rows, groups = stored["scale"].shape
    count = rows * groups * GROUP
    bitfield = np.unpackbits(stored["codes"].numpy())[: count * bits].reshape(count, bits)
    codes = bitfield @ (1 << np.arange(bits - 1, -1, -1))
    values = torch.from_numpy(codes.astype(np.float32)).view(rows, groups, GROUP)
    values = values * stored["scale"].float().unsqueeze(-1) + stored["low"].float().unsqueeze(-1)
    return values.view(rows, -1)[:, :columns]


def compress(pivot: LazyCheckpoint, target: LazyCheckpoint, directory: Path, ratio: float) -> dict[str, float]:
    """Writes ``delta.safetensors`` and ``delta.json``; returns bytes, the target's bytes, and the relative error of the deltas."""
    if not 0 < ratio <= 1:
        raise UserError(f"merge.ratio={ratio} is outside (0, 1]; 0.0625 keeps a sixteenth")
    tensors: dict[str, Tensor] = {}
    plan: dict[str, Any] = {}
    lost = total = 0.0
    for name, info in pivot.infos.items():
        if len(info.shape) != 2 or not BLOCK.match(name):
            tensors[name] = target.tensor(name).clone()
            continue
        delta = target.tensor(name).float() - pivot.tensor(name).float()
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        at, ranks = 0, ranks_of(info.shape, ratio)
        for bits, count in ranks:
            part = slice(at, at + count)
            if count:
                for side, vectors in (("u", u[:, part].t()), ("v", vh[part])):
                    tensors |= {
                        f"{name}:{side}{bits}:{key}": value
                        for key, value in quantize(vectors.contiguous(), bits).items()
                    }
                tensors[f"{name}:s{bits}"] = s[part].clone()
            at += count
        plan[name] = [[bits, count] for bits, count in ranks]
        again = _low_rank(tensors.__getitem__, name, plan[name], info.shape)
        lost, total = lost + float((again - delta).square().sum()), total + float(delta.square().sum())
    save_file(tensors, directory / FILE)
    (directory / RECORD).write_text(
        json.dumps({"pivot": model_identity(str(pivot.path)), "ratio": ratio, "ranks": plan}, indent=1) + "\n"
    )
    size = sum(info.bytes for info in target.infos.values())
    return {
        "bytes": (directory / FILE).stat().st_size,
        "target_bytes": size,
        "relative_error": (lost / total) ** 0.5 if total else 0.0,
    }


class CompressedCheckpoint(LazyCheckpoint):
    """A compressed target that reads like a checkpoint: tensors are rebuilt from the pivot when asked for.

    Raises `UserError` where the pivot is not the one it was made against.
    """

    def __init__(self, path: Path, pivot: LazyCheckpoint) -> None:
        self.path, self.pivot = path, pivot
        record = json.loads((path / RECORD).read_text())
        if record["pivot"] != model_identity(str(pivot.path)):
            raise UserError(
                f"{path} was compressed against another pivot than {pivot.path}; give the pivot it was made with"
            )
        self.ranks: dict[str, list[list[int]]] = record["ranks"]
        opened: Any = safe_open(path / FILE, framework="pt")
        self._delta = opened
        self.infos = {name: TensorInfo(i.shape, i.dtype, path / FILE, -1) for name, i in pivot.infos.items()}
        for name in self.infos.keys() - self.ranks.keys():
            stored = opened.get_slice(name)
            self.infos[name] = TensorInfo(tuple(stored.get_shape()), self.infos[name].dtype, path / FILE, -1)
        self._open, self._bin = {}, {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def tensor(self, name: str) -> Tensor:
        """pivot + low-rank delta, in fp32; parameters that were not compressed come as they are."""
        if name not in self.ranks:
            return self._delta.get_tensor(name)  # type: ignore[no-any-return]
        delta = _low_rank(self._delta.get_tensor, name, self.ranks[name], self.infos[name].shape)
        return self.pivot.tensor(name).float() + delta


def open_checkpoint(path: Path, pivot: LazyCheckpoint) -> LazyCheckpoint:
    """A target, compressed or not."""
    return CompressedCheckpoint(path, pivot) if (path / RECORD).exists() else LazyCheckpoint(path)


def _low_rank(get: Any, name: str, ranks: list[list[int]], shape: tuple[int, ...]) -> Tensor:
    delta = torch.zeros(shape)
    for bits, count in ranks:
        if count:
            parts = {
                side: {key: get(f"{name}:{side}{bits}:{key}") for key in ("codes", "scale", "low")} for side in "uv"
            }
            u, v = dequantize(parts["u"], bits, shape[0]), dequantize(parts["v"], bits, shape[1])
            delta.addmm_(u.t() * get(f"{name}:s{bits}"), v)
    return delta
