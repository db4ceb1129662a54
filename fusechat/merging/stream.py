"""Merging whole checkpoints, streamed: parameter by parameter, in slices where the method allows."""

from __future__ import annotations

import logging
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.merging import methods
from fusechat.merging.slices import Slices
from fusechat.merging.tokens import match_rows
from fusechat.merging.varm import GRANULARITIES, Change, group_of, group_weights, measure
from fusechat.models.checkpoints import CheckpointWriter, LazyCheckpoint, bytes_of

LOG = logging.getLogger(__name__)
NAMES = (
    "varm",
    "linear",
    "task_arithmetic",
    "ties",
    "sce",
    "dare",
    "della",
    "breadcrumbs",
    "slerp",
    "model_stock",
    "widen",
)
UNWEIGHTED = {"sce", "slerp", "model_stock", "widen"}  # methods that make their weights themselves
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
NOT_COPIED = {"README.md", "fusechat.json", ".gitattributes"}


@dataclass
class Merge:
    """A merge of ``targets`` into the pivot's shape by ``method``; ``settings`` are that method's own.

    weights: one per target (default: equal). patterns: [{match: regex, weights: [...]}] or [{match: regex, keep: pivot}],
    the first that fits a parameter's name counts. dtype: None stores the pivot's. Raises `UserError` where checkpoints
    do not belong together.
    """

    pivot: LazyCheckpoint
    targets: Sequence[LazyCheckpoint]
    method: str
    settings: Mapping[str, Any]
    weights: Sequence[float] | None = None
    patterns: Sequence[Mapping[str, Any]] = ()
    dtype: str | None = None
    seed: int = 0
    groups: dict[str, list[float] | None] = field(default_factory=dict)
    changes: list[dict[str, Change]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_inputs(self.pivot, self.targets)
        if self.weights is not None and len(self.weights) != len(self.targets):
            raise UserError(
                f"merge.weights has {len(self.weights)} values for {len(self.targets)} targets; give one for each"
            )
        self.replaced = [match_rows(self.pivot, target) for target in self.targets]
        check_shapes(self.pivot, self.targets, self.replaced)
        self.floating = [name for name, info in self.pivot.infos.items() if info.dtype.is_floating_point]

    @property
    def plan(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """name -> shape and stored dtype."""
        wanted = getattr(torch, self.dtype) if self.dtype else None
        return {
            n: (i.shape, wanted if wanted and i.dtype.is_floating_point else i.dtype)
            for n, i in self.pivot.infos.items()
        }

    def measure(self, hashes: Mapping[str, str]) -> None:
        """First pass, for VaRM: every target's change against the pivot, and the groups' weights. hashes: of the inputs, by path."""
        keys = [f"{hashes[str(self.pivot.path)]}:{hashes[str(target.path)]}" for target in self.targets]
        each = zip(self.targets, keys, self.replaced, strict=True)
        self.changes = [measure(self.pivot, target, self.floating, key, rows) for target, key, rows in each]
        if self.settings["granularity"] != "parameter":
            options = {key: self.settings[key] for key in ("granularity", "variation", "weighting", "temperature")}
            self.groups = group_weights(self.changes, **options)
        changed = any(change.square > 0 for target in self.changes for change in target.values())
        if not changed and not self.settings["allow_unchanged"]:
            raise UserError(
                f"no target differs from the pivot {self.pivot.path}: every VaRM weight is 0/0; "
                "check targets, or pass merge.allow_unchanged=true to write the pivot again"
            )

    def write(self, directory: Path, max_shard_size: str | int) -> list[Path]:
        """Second pass: merges every parameter into ``directory``; returns the weight files."""
        writer = CheckpointWriter(directory, self.plan, bytes_of(max_shard_size))
        names = list(self.plan)
        for position, name in enumerate(names):
            for checkpoint in (self.pivot, *self.targets):
                for later in names[position + 1 : position + 3]:
                    checkpoint.read_ahead(later)
            self._write_tensor(writer, name)
        return writer.close()

    def _write_tensor(self, writer: CheckpointWriter, name: str) -> None:
        pivot = self.pivot.tensor(name)
        if name not in self.floating or self._kept(name):
            writer.write(name, pivot)
            return
        targets = [r.get(name, None) for r in self.replaced]
        tensors = [t.tensor(name) if r is None else r for t, r in zip(self.targets, targets, strict=True)]
        for part in self._merged(name, Slices(pivot, tensors)):
            writer.write(name, self._checked(name, part))

    def _merged(self, name: str, slices: Slices) -> Iterator[Tensor]:
        weights, s = self._weights(name), self.settings
        if self.method == "varm":
            return self._varm(name, slices)
        many = {key: self._each(s[key]) for key in ("density", "gamma") if key in s and self.method != "sce"}
        own = {key: value for key, value in s.items() if key not in many}
        if self.method in ("dare", "della"):
            own["seed"] = [self.seed, zlib.crc32(name.encode())]
        if self.method == "widen":
            own["transposed"] = slices.pivot.dim() == 2 and not re.search(r"\.\d+\.|head|embed_out", name)
        first = [] if self.method in UNWEIGHTED else [weights]
        return getattr(methods, self.method)(slices, *first, **many, **own)  # type: ignore[no-any-return]

    def _varm(self, name: str, slices: Slices) -> Iterator[Tensor]:
        pattern = self._pattern(name)
        if pattern:
            return methods.linear(slices, pattern["weights"])
        if self.settings["granularity"] == "parameter":
            return methods.element_weighted(slices, 2 if self.settings["variation"] == "square" else 1)
        varied = self.groups[group_of(name, self.settings["granularity"])]
        return methods.linear(slices, varied) if varied is not None else (pivot for pivot, _ in slices)

    def _checked(self, name: str, merged: Tensor) -> Tensor:
        if not bool(torch.isfinite(merged.sum())) and not bool(torch.isfinite(merged).all()):
            for checkpoint in (self.pivot, *self.targets):
                if not bool(torch.isfinite(checkpoint.tensor(name).float()).all()):
                    raise UserError(
                        f"{checkpoint.path}: {name} holds NaN or inf; the model is broken, train or download it again"
                    )
            raise UserError(f"merging {name} by {self.method} gives NaN or inf; check merge.weights and merge.scale")
        return merged

    def _weights(self, name: str) -> list[float]:
        pattern = self._pattern(name)
        found = pattern["weights"] if pattern else self.weights
        if found is not None and len(found) != len(self.targets):
            raise UserError(f"merge.patterns: {len(found)} weights for {len(self.targets)} targets at {name}")
        return list(found) if found is not None else [1.0] * len(self.targets)

    def _pattern(self, name: str) -> Mapping[str, Any] | None:
        return next((p for p in self.patterns if re.search(p["match"], name) and "weights" in p), None)

    def _kept(self, name: str) -> bool:
        first = next((p for p in self.patterns if re.search(p["match"], name)), None)
        return first is not None and first.get("keep") == "pivot"

    def _each(self, value: Any) -> list[float]:
        return [float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value)] * len(self.targets)


def check_inputs(pivot: LazyCheckpoint, targets: Sequence[LazyCheckpoint]) -> None:
    """Raises `UserError` for too few targets, the same one twice, or different architectures."""
    import json

    paths = [target.path.resolve() for target in targets]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise UserError(f"the target {twice[0]} is given twice; remove one, or give it a weight with merge.weights")
    if len(targets) < 2:
        raise UserError(f"merging needs at least two targets, {len(targets)} given; see targets='[DIR,DIR]'")
    configs = [
        json.loads((c.path / "config.json").read_text()) if (c.path / "config.json").exists() else {}
        for c in (pivot, *targets)
    ]
    for target, config in zip(targets, configs[1:], strict=True):
        if config.get("model_type") != configs[0].get("model_type"):
            raise UserError(
                f"{target.path} is a {config.get('model_type')} model, the pivot {pivot.path} a {configs[0].get('model_type')}; "
                "only models of one architecture can be merged: fuse the other one first (train.py)"
            )


def check_shapes(
    pivot: LazyCheckpoint, targets: Sequence[LazyCheckpoint], replaced: Sequence[Mapping[str, Tensor]]
) -> None:
    """Raises `UserError` naming the first parameter that is missing, extra or of another shape."""
    for target, own in zip(targets, replaced, strict=True):
        if missing := [name for name in pivot if name not in target]:
            raise UserError(
                f"{target.path} lacks {missing[0]} ({len(missing)} parameters missing); it is not a target of {pivot.path}"
            )
        if extra := [name for name in target if name not in pivot]:
            raise UserError(
                f"{target.path} has {extra[0]}, which the pivot {pivot.path} lacks ({len(extra)} parameters extra)"
            )
        for name, info in pivot.infos.items():
            shape = tuple(own[name].shape) if name in own else target.infos[name].shape
            if shape != info.shape:
                raise UserError(f"{name}: shape {shape} in {target.path}, {info.shape} in the pivot {pivot.path}")


def copy_companions(pivot: Path, directory: Path, dtype: str | None) -> None:
    """Copies config, tokenizer, chat template and generation config of the pivot."""
    import json

    for file in sorted(pivot.iterdir()):
        if (
            file.is_file()
            and not file.name.endswith(WEIGHTS)
            and file.name not in NOT_COPIED
            and not file.name.startswith(".")
        ):
            shutil.copyfile(file, directory / file.name)
    config = directory / "config.json"
    if dtype and config.exists():
        content = json.loads(config.read_text())
        content["dtype" if "dtype" in content else "torch_dtype"] = dtype
        config.write_text(json.dumps(content, indent=2) + "\n")


def describe(merge: Merge, max_shard_size: str | int) -> str:
    """The plan, for ``merge.dry_run``: groups with weights, and what would be written."""
    plan = merge.plan
    size = sum(int(torch.Size(shape).numel()) * dtype.itemsize for shape, dtype in plan.values())
    lines = [f"{merge.method}: {len(plan)} parameters, {size / 1e6:,.1f} MB in shards of {max_shard_size}"]
    for name, (shape, dtype) in plan.items():
        weights = (
            merge.groups.get(group_of(name, merge.settings["granularity"]))
            if merge.method == "varm"
            else merge._weights(name)
        )
        shown = "pivot" if merge._kept(name) or (weights is None and merge.method == "varm") else _listed(weights)
        lines.append(f"  {name}  {tuple(shape)}  {str(dtype).removeprefix('torch.')}  {shown}")
    return "\n".join(lines)


def _listed(weights: Sequence[float] | None) -> str:
    return ", ".join(f"{w:.4f}" for w in weights or [])


__all__ = ["GRANULARITIES", "NAMES", "Merge", "check_inputs", "check_shapes", "copy_companions", "describe"]
