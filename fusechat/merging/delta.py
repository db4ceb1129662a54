"""Delta store: a target kept as pivot + low-rank delta of mixed precision (Delta-CoMe, arXiv 2406.08903, without GPTQ).

Every weight matrix of a block: delta = U S V by SVD; the first 2 singular vectors at 8 bits, the next 32 at 3, the
rest at 2 as far as the budget of 16 * ratio bits per element goes; round-to-nearest in groups of 128, S unquantised.
Other parameters are kept as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.app.outputs import read_json, write_json
from fusechat.app.progress import bytes_progress
from fusechat.merging.family import METHODS
from fusechat.merging.groups import BLOCK
from fusechat.merging.slices import Slices
from fusechat.models.checkpoints import LazyCheckpoint, TensorInfo
from fusechat.models.computed import Source, low_rank, whole_of
from fusechat.models.load import model_identity
from fusechat.models.whole import check_model

FILE, RECORD = "delta.safetensors", "delta.json"
GROUP = 128
SMALLEST = 6e-8  # scale of a group whose elements are equal: the smallest half
RANKS, REST = ((8, 2), (3, 32)), 2  # (bits, singular vectors); the rest of the budget goes to 2 bits


def ranks_of(shape: tuple[int, ...], ratio: float) -> list[tuple[int, int]]:
    """(bits, vectors) for a matrix: sum of vectors * bits * (m + n) is about 16 * ratio * m * n bits."""
    m, n = shape
    budget = 16 * ratio * m * n / (m + n)  # bits for each element of a pair of singular vectors
    left = min(m, n)
    bands = []
    for bits, wanted in (*RANKS, (REST, left)):
        count = min(left, wanted, int(budget // bits))
        budget, left = budget - bits * count, left - count
        bands.append((bits, count))
    return bands


def quantize(vectors: Tensor, bits: int) -> dict[str, Tensor]:
    """Rows of ``vectors`` [R, C] in groups of 128, min to max: packed codes, fp16 scale and offset per group."""
    padded = torch.nn.functional.pad(vectors, (0, -vectors.shape[1] % GROUP))
    groups = padded.view(vectors.shape[0], -1, GROUP)
    steps = 2**bits - 1
    low = groups.amin(-1, keepdim=True).half().float()
    scale = ((groups.amax(-1, keepdim=True) - low) / steps).half().float().clamp_min(SMALLEST)
    codes = ((groups - low) / scale).round_().clamp_(0, steps).to(torch.uint8)
    flat: npt.NDArray[np.uint8] = codes.numpy().reshape(-1)
    bitfield = np.unpackbits(flat[:, None], axis=1)[:, 8 - bits :]
    packed = np.packbits(bitfield)
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


@METHODS.register("compress", "keep a target as pivot + compressed delta", needs=("store",))
def compress(slices: Slices, ratio: float = 0.0625) -> dict[str, Tensor]:
    """One matrix of one target for the delta store: its δ = U S V, quantised in bands of singular vectors.

    A member of the family because command, config group, checks of the inputs and record are those of a merge; its need
    ``store`` says that what it returns is kept as it is, under the parameter's name, instead of streamed into a model.
    """
    if not 0 < ratio <= 1:
        raise UserError(f"merge.ratio={ratio} is outside (0, 1]; 0.0625 keeps a sixteenth")
    pivot, target = slices.whole()
    u, s, vh = torch.linalg.svd(target - pivot, full_matrices=False)
    stored: dict[str, Tensor] = {}
    start = 0
    for bits, count in ranks_of(tuple(slices.shape), ratio):
        if count == 0:
            continue
        band = slice(start, start + count)
        for side, vectors in (("u", u[:, band].t()), ("v", vh[band])):
            quantised = quantize(vectors.contiguous(), bits)
            stored |= {f"{side}{bits}:{key}": value for key, value in quantised.items()}
        stored[f"s{bits}"] = s[band].clone()
        start += count
    return stored


def write_store(
    pivot: LazyCheckpoint, target: LazyCheckpoint, directory: Path, ratio: float, identity: str
) -> dict[str, float]:
    """Writes ``delta.safetensors`` and ``delta.json``; returns bytes, the target's bytes, the deltas' relative error.

    identity: the pivot's, without whom the store is worth nothing.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, list[tuple[int, int]]] = {}
    lost = total = 0.0
    with bytes_progress("compress", sum(info.bytes for info in pivot.infos.values())) as tell:
        for name, info in pivot.infos.items():
            tell(info.bytes)
            if len(info.shape) != 2 or not BLOCK.match(name):
                tensors[name] = target.tensor(name).clone()
                continue
            matrix = Slices(pivot.tensor(name), [target.tensor(name)])
            tensors |= {f"{name}:{part}": value for part, value in compress(matrix, ratio).items()}
            ranks[name] = ranks_of(info.shape, ratio)
            delta = target.tensor(name).float() - pivot.tensor(name).float()
            left, right = factors(tensors.__getitem__, name, ranks[name], info.shape)
            lost += float((left @ right - delta).square().sum())
            total += float(delta.square().sum())
    for checkpoint in (pivot, target):
        checkpoint.verify()
    save_file(tensors, directory / FILE)
    write_json(directory / RECORD, {"pivot": identity, "ratio": ratio, "ranks": ranks})
    return {
        "bytes": (directory / FILE).stat().st_size,
        "target_bytes": sum(info.bytes for info in target.infos.values()),
        "relative_error": (lost / total) ** 0.5 if total else 0.0,
    }


class CompressedCheckpoint(LazyCheckpoint):
    """A compressed target that reads like a checkpoint: tensors are rebuilt from the pivot when asked for.

    Raises `UserError` where the pivot is not the one it was made against.
    """

    def __init__(self, path: Path, pivot: LazyCheckpoint) -> None:
        self.path, self.pivot = path, pivot
        check_model(path)
        record = read_json(path / RECORD)
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
        self._maps, self._bin, self._streams = {}, {}, {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def tensor(self, name: str) -> Tensor:
        """pivot + low-rank delta, in fp32; parameters that were not compressed come as they are."""
        return whole_of(self.source(name))

    def source(self, name: str) -> Source:
        """The same by rows."""
        if name not in self.ranks:
            return self._delta.get_tensor(name)  # type: ignore[no-any-return]
        shape = self.infos[name].shape
        left, right = factors(self._delta.get_tensor, name, self.ranks[name], shape)
        return low_rank(self.pivot.tensor(name), left, right)


def factors(
    get: Callable[[str], Tensor], name: str, ranks: Sequence[Sequence[int]], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """U S [m, R] and V [R, n] of a stored matrix, in fp32.

    get: stored tensors by name; ranks: (bits, vectors) of every band.
    """
    left, right = [torch.zeros(shape[0], 0)], [torch.zeros(0, shape[1])]
    for bits, count in ranks:
        if count:
            sides = {
                side: {key: get(f"{name}:{side}{bits}:{key}") for key in ("codes", "scale", "low")} for side in "uv"
            }
            left.append(dequantize(sides["u"], bits, shape[0]).t() * get(f"{name}:s{bits}"))
            right.append(dequantize(sides["v"], bits, shape[1]))
    return torch.cat(left, 1), torch.cat(right)
