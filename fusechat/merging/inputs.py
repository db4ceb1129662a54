"""What is merged: pivot and targets opened, and checked to belong together before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.app.texts import json_object
from fusechat.merging import delta
from fusechat.merging.adapters import AdapterCheckpoint, is_adapter
from fusechat.merging.slices import Slices
from fusechat.merging.stack import Blocks, StackedCheckpoint
from fusechat.merging.tokens import match_rows
from fusechat.models.checkpoints import LazyCheckpoint
from fusechat.models.computed import Source

MAPPED = 1 << 23  # elements of a parameter that stay mapped at most: 16 MiB of bfloat16


@dataclass(frozen=True)
class Inputs:
    """Open checkpoints. matched: per target, embeddings whose rows are brought into the pivot's order."""

    pivot: LazyCheckpoint
    targets: Sequence[LazyCheckpoint]
    matched: Sequence[Mapping[str, Source]]

    @property
    def floating(self) -> list[str]:
        """The parameters that can be merged; others (integers, masks) are the pivot's."""
        return [name for name, info in self.pivot.infos.items() if info.dtype.is_floating_point]

    def source(self, j: int, name: str) -> Source:
        """A parameter of target ``j`` in the pivot's shape."""
        moved = self.matched[j].get(name)
        return self.targets[j].source(name) if moved is None else moved

    def slices(self, name: str, device: str = "cpu") -> Slices:
        """A parameter of pivot and targets, watched while it is read."""
        return self._watched(name, range(len(self.targets)), device)

    def slices_of(self, j: int, name: str) -> Slices:
        """The same of one target alone."""
        return self._watched(name, [j], "cpu")

    def check_equal(self, name: str) -> None:
        """Raises `UserError` where a parameter that cannot be merged is not the pivot's in every target."""
        for checkpoint in self.targets:
            if not torch.equal(checkpoint.tensor(name), self.pivot.tensor(name)):
                raise UserError(
                    f"{checkpoint.path}: {name} ({checkpoint.infos[name].dtype}) differs from the pivot's in "
                    f"{self.pivot.path}, and integers cannot be merged; give targets of this pivot"
                )

    def read_ahead(self, names: Sequence[str]) -> None:
        """Asks the kernel to have these parameters in memory soon."""
        for checkpoint in (self.pivot, *self.targets):
            for name in names:
                checkpoint.read_ahead(name)

    def let_go(self, name: str) -> None:
        """Tells the kernel that a parameter need not stay in memory."""
        for checkpoint in (self.pivot, *self.targets):
            checkpoint.let_go(name)

    def _watched(self, name: str, chosen: Sequence[int], device: str) -> Slices:
        checkpoints = [self.pivot, *(self.targets[j] for j in chosen)]
        sources = [self.source(j, name) for j in chosen]
        return Slices(self.pivot.tensor(name), sources, device, Watch(name, checkpoints))


class Watch:
    """Follows the passes over one parameter: numbers are checked in the first, and pages let go behind each.

    Raises `UserError` where a checkpoint holds NaN or inf.
    """

    def __init__(self, name: str, checkpoints: Sequence[LazyCheckpoint]) -> None:
        self.name, self.checkpoints = name, checkpoints
        self.checked = self.kept = 0  # elements that were checked; the first that is still mapped

    def __call__(self, start: int, read: Sequence[Tensor]) -> None:
        if start >= self.checked:
            for checkpoint, tensor in zip(self.checkpoints, read, strict=True):
                check_finite(tensor, f"{checkpoint.path}: {self.name}")
            self.checked = start + read[0].numel()
        if start < self.kept:  # a further pass
            self.kept = 0
        if start - self.kept >= MAPPED:
            for checkpoint in self.checkpoints:
                checkpoint.let_go(self.name, self.kept, start)
            self.kept = start


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises `UserError` for NaN or inf. what: names the tensor."""
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):  # a sum is cheaper by far
        raise UserError(f"{what} holds NaN or inf; the model is broken, train or download it again")


def open_inputs(pivot: Path, targets: Sequence[Path], by_token: bool = True, blocks: Blocks = ()) -> Inputs:
    """Opens the checkpoints. by_token: targets with other tokens are matched row by row.

    blocks: where given, the one target, and the pivot's shape, are a stack of the targets' layers (see `stack`).

    Raises `UserError` for broken files, another architecture, and the first parameter that is missing, extra or of
    another shape.
    """
    own = LazyCheckpoint(pivot)
    inputs = Inputs(own, [open_checkpoint(path, own) for path in targets], [])
    _check_architectures(inputs)
    if blocks:
        stack = StackedCheckpoint(inputs.targets, blocks)
        return Inputs(stack, [stack], [{}])
    matched = [match_rows(own, target) if by_token else {} for target in inputs.targets]
    for target, moved in zip(inputs.targets, matched, strict=True):
        _check_shapes(own, target, moved)
    return Inputs(own, inputs.targets, matched)


def open_checkpoint(path: Path, pivot: LazyCheckpoint) -> LazyCheckpoint:
    """A target: a model, an adapter or a delta store of the pivot."""
    if (path / delta.RECORD).exists():
        return delta.CompressedCheckpoint(path, pivot)
    return AdapterCheckpoint(path, pivot) if is_adapter(path) else LazyCheckpoint(path)


def _check_architectures(inputs: Inputs) -> None:
    files = [checkpoint.path / "config.json" for checkpoint in (inputs.pivot, *inputs.targets)]
    own, *others = [json_object(file).get("model_type") if file.exists() else None for file in files]
    for target, kind in zip(inputs.targets, others, strict=True):
        if kind != own and not is_adapter(target.path):
            raise UserError(
                f"{target.path} is a {kind} model, the pivot {inputs.pivot.path} a {own}; "
                "only models of one architecture can be merged: fuse the other one first (train.py)"
            )


def _check_shapes(pivot: LazyCheckpoint, target: LazyCheckpoint, moved: Mapping[str, Source]) -> None:
    if missing := [name for name in pivot if name not in target]:
        raise UserError(
            f"{target.path} lacks {missing[0]} ({len(missing)} parameters missing); it is not a target of {pivot.path}"
        )
    if extra := [name for name in target if name not in pivot]:
        raise UserError(
            f"{target.path} has {extra[0]}, which the pivot {pivot.path} lacks ({len(extra)} parameters extra)"
        )
    for name, info in pivot.infos.items():
        theirs = target.infos[name]
        if name not in moved and theirs.shape != info.shape:
            raise UserError(f"{name}: shape {theirs.shape} in {target.path}, {info.shape} in the pivot {pivot.path}")
        if theirs.dtype.is_floating_point != info.dtype.is_floating_point:
            raise UserError(
                f"{name}: {theirs.dtype} in {target.path}, {info.dtype} in the pivot {pivot.path}; "
                "quantised weights cannot be merged: give the model as it was before"
            )
