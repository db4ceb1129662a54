"""What is merged: pivot and targets opened, and checked to belong together before anything is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.merging.delta import open_checkpoint
from fusechat.merging.slices import Slices
from fusechat.merging.tokens import match_rows
from fusechat.models.checkpoints import LazyCheckpoint


@dataclass(frozen=True)
class Inputs:
    """Open checkpoints. matched: per target, embeddings whose rows were brought into the pivot's order."""

    pivot: LazyCheckpoint
    targets: Sequence[LazyCheckpoint]
    matched: Sequence[Mapping[str, Tensor]]

    @property
    def floating(self) -> list[str]:
        """The parameters that can be merged; others (integers, masks) are the pivot's."""
        return [name for name, info in self.pivot.infos.items() if info.dtype.is_floating_point]

    def tensor(self, j: int, name: str) -> Tensor:
        """A parameter of target ``j`` in the pivot's shape."""
        moved = self.matched[j].get(name)
        return self.targets[j].tensor(name) if moved is None else moved

    def slices(self, name: str) -> Slices:
        """A parameter of pivot and targets."""
        return Slices(self.pivot.tensor(name), [self.tensor(j, name) for j in range(len(self.targets))])

    def read_ahead(self, names: Sequence[str]) -> None:
        """Asks the kernel to have these parameters in memory soon."""
        for checkpoint in (self.pivot, *self.targets):
            for name in names:
                checkpoint.read_ahead(name)


def open_inputs(pivot: Path, targets: Sequence[Path], by_token: bool = True) -> Inputs:
    """Opens the checkpoints. by_token: targets with other tokens are matched row by row.

    Raises `UserError` for broken files, another architecture, and the first parameter that is missing, extra or of
    another shape.
    """
    own = LazyCheckpoint(pivot)
    inputs = Inputs(own, [open_checkpoint(path, own) for path in targets], [])
    _check_architectures(inputs)
    matched = [match_rows(own, target) if by_token else {} for target in inputs.targets]
    for target, moved in zip(inputs.targets, matched, strict=True):
        _check_shapes(own, target, moved)
    return Inputs(own, inputs.targets, matched)


def _check_architectures(inputs: Inputs) -> None:
    files = [checkpoint.path / "config.json" for checkpoint in (inputs.pivot, *inputs.targets)]
    own, *others = [json.loads(file.read_text()).get("model_type") if file.exists() else None for file in files]
    for target, kind in zip(inputs.targets, others, strict=True):
        if kind != own:
            raise UserError(
                f"{target.path} is a {kind} model, the pivot {inputs.pivot.path} a {own}; "
                "only models of one architecture can be merged: fuse the other one first (train.py)"
            )


def _check_shapes(pivot: LazyCheckpoint, target: LazyCheckpoint, moved: Mapping[str, Tensor]) -> None:
    if missing := [name for name in pivot if name not in target]:
        raise UserError(
            f"{target.path} lacks {missing[0]} ({len(missing)} parameters missing); it is not a target of {pivot.path}"
        )
    if extra := [name for name in target if name not in pivot]:
        raise UserError(
            f"{target.path} has {extra[0]}, which the pivot {pivot.path} lacks ({len(extra)} parameters extra)"
        )
    for name, info in pivot.infos.items():
        shape = tuple(moved[name].shape) if name in moved else target.infos[name].shape
        if shape != info.shape:
            raise UserError(f"{name}: shape {shape} in {target.path}, {info.shape} in the pivot {pivot.path}")
