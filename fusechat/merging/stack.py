"""A model of other models' layers, one on top of the other: mergekit's passthrough."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.merging.groups import is_embedding, layer_of, renumbered
from fusechat.models.checkpoints import LazyCheckpoint
from fusechat.models.computed import Source

Blocks = Sequence[tuple[int, int]]  # for each layer: the model that it is of, and which of its layers
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


class StackedCheckpoint(LazyCheckpoint):
    """Read like one checkpoint: embeddings of the first block's model, what follows the blocks of the last's.

    Raises `UserError` for a layer that is not there, and for layers of different shapes.
    """

    def __init__(self, checkpoints: Sequence[LazyCheckpoint], blocks: Blocks) -> None:
        self.path, self.checkpoints = checkpoints[0].path, list(checkpoints)
        self._places: dict[str, tuple[LazyCheckpoint, str]] = {}
        first, last = checkpoints[blocks[0][0]], checkpoints[blocks[-1][0]]
        for name in first:
            if layer_of(name) is None and is_embedding(name):
                self._places[name] = (first, name)
        for place, (model, layer) in enumerate(blocks):
            self._add_block(place, checkpoints[model], layer)
        for name in last:
            if layer_of(name) is None and not is_embedding(name):
                self._places[name] = (last, name)
        self.infos = {name: checkpoint.infos[own] for name, (checkpoint, own) in self._places.items()}
        self._check_shapes()

    def tensor(self, name: str) -> Tensor:
        checkpoint, own = self._places[name]
        return checkpoint.tensor(own)

    def source(self, name: str) -> Source:
        checkpoint, own = self._places[name]
        return checkpoint.source(own)

    def verify(self) -> None:
        for checkpoint in self.checkpoints:
            checkpoint.verify()

    def read_ahead(self, name: str) -> None:
        checkpoint, own = self._places[name]
        checkpoint.read_ahead(own)

    def let_go(self, name: str, start: int = 0, stop: int | None = None) -> None:
        checkpoint, own = self._places[name]
        checkpoint.let_go(own, start, stop)

    def _add_block(self, place: int, checkpoint: LazyCheckpoint, layer: int) -> None:
        names = [name for name in checkpoint if layer_of(name) == layer]
        if not names:
            raise UserError(f"{checkpoint.path} has no layer {layer}; see merge.recipe's layer_range")
        self._places |= {renumbered(name, place): (checkpoint, name) for name in names}

    def _check_shapes(self) -> None:
        """Layers of other shapes, or of another kind, make no model of one config."""
        for name, info in self.infos.items():
            layer = layer_of(name)
            like = None if layer is None else self.infos.get(renumbered(name, 0))
            if layer is not None and (like is None or like.shape != info.shape):
                checkpoint, own = self._places[name]
                other = f"layer 0 has {like.shape}" if like else "layer 0 has no such parameter"
                raise UserError(f"{checkpoint.path}: {own} has shape {info.shape}, {other}; these layers do not stack")


def stacked_names(names: Iterable[str], count: int) -> list[str]:
    """A model's parameters, were its blocks ``count`` like the first."""
    found = []
    for name in names:
        layer = layer_of(name)
        found += [name] if layer is None else [renumbered(name, i) for i in range(count)] if layer == 0 else []
    return found


def stack_config(directory: Path, blocks: Blocks) -> None:
    """Gives the config.json of a folder as many layers; what it lists for each layer goes with them.

    Raises `UserError` where it does not say how many layers there are.
    """
    file = directory / "config.json"
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    key = next((key for key in COUNTS if key in content), None)
    if key is None:
        raise UserError(f"{file} has none of {', '.join(COUNTS)}; layers of such a model cannot be stacked")
    before, content[key] = content[key], len(blocks)
    listed = content.get("layer_types")
    if isinstance(listed, list) and len(listed) == before:
        content["layer_types"] = [listed[layer] for _, layer in blocks]
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
