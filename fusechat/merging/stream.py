"""Merging whole checkpoints, streamed: parameter by parameter, slice by slice."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.app.progress import bytes_progress
from fusechat.merging.groups import group_of
from fusechat.merging.inputs import Inputs
from fusechat.merging.recipe import Recipe
from fusechat.merging.varm import GroupWeights
from fusechat.models.shards import CheckpointWriter, bytes_of

VECTORS_IN_COLUMNS = re.compile(r"\.\d+\.|head|embed_out")  # matrices of blocks and heads; embeddings are what is left
AHEAD = 2  # parameters that are read ahead
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def layout_of(inputs: Inputs, dtype: str | None) -> Layout:
    """Parameter -> shape and dtype of the merged model. dtype: of the floats; None keeps the pivot's."""
    wanted = getattr(torch, dtype) if dtype else None
    return {
        name: (info.shape, wanted if wanted and info.dtype.is_floating_point else info.dtype)
        for name, info in inputs.pivot.infos.items()
    }


def size_of(layout: Layout) -> int:
    """Bytes of all parameters."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.values())


def write_merged(inputs: Inputs, recipe: Recipe, groups: GroupWeights, directory: Path) -> Mapping[str, str]:
    """Merges every parameter into ``directory``; returns the weight files' xxh3_128.

    groups: where ``variation`` is needed. Raises `UserError` where an input is damaged.
    """
    layout = layout_of(inputs, recipe.dtype)
    names, floating = list(layout), set(inputs.floating)
    writer = CheckpointWriter(directory, layout, bytes_of(recipe.max_shard_size))
    with bytes_progress(f"merge by {recipe.method}", size_of(layout)) as tell:
        for position, name in enumerate(names, 1):
            inputs.read_ahead(names[position : position + AHEAD])
            if name in floating:
                for part in merged_parts(inputs, recipe, groups, name):
                    writer.write(name, part)
                    tell(part.numel() * layout[name][1].itemsize)
            else:
                inputs.check_equal(name)
                writer.write(name, inputs.pivot.tensor(name))
                tell(inputs.pivot.infos[name].bytes)
            inputs.let_go(name)
    writer.close()
    for checkpoint in (inputs.pivot, *inputs.targets):
        checkpoint.verify()
    return writer.digests


def merged_parts(inputs: Inputs, recipe: Recipe, groups: GroupWeights, name: str) -> Iterator[Tensor]:
    """A merged parameter's slices. Raises `UserError` where they are not finite."""
    slices = inputs.slices(name, recipe.device)
    if keeps_pivot(recipe, name):
        yield from (pivot for pivot, _ in slices)
        return
    for part in recipe.member.function(slices, **handed_over(recipe, groups, name, len(slices.shape))):
        if not bool(torch.isfinite(part.sum())) and not bool(torch.isfinite(part).all()):
            raise UserError(f"merging {name} by {recipe.method} gives NaN or inf; check merge.weights and merge.scale")
        yield part


def keeps_pivot(recipe: Recipe, name: str) -> bool:
    """Whether a pattern says that a parameter stays the pivot's."""
    return recipe.pattern_at(name).get("keep") == "pivot"


def handed_over(recipe: Recipe, groups: GroupWeights, name: str, dimensions: int) -> dict[str, Any]:
    """The method's arguments for one parameter: its settings and what it needs, see `family.NEEDS`."""
    needs = recipe.member.needs
    handed = recipe.settings_at(name)
    of_pattern = recipe.pattern_at(name).get("weights")
    if "variation" in needs:
        handed["weights"] = of_pattern or groups.get(group_of(name, recipe.settings["granularity"]))
    if "weights" in needs:
        handed["weights"] = list(of_pattern or recipe.weights or [1.0] * recipe.count)
    if "seed" in needs:
        handed["seed"] = [recipe.seed, zlib.crc32(name.encode())]
    if "name" in needs:
        handed["name"] = name
    if "transposed" in needs:
        handed["transposed"] = dimensions == 2 and not VECTORS_IN_COLUMNS.search(name)
    return handed


def describe(inputs: Inputs, recipe: Recipe, groups: GroupWeights) -> str:
    """What would be written: every parameter with its weights."""
    layout = layout_of(inputs, recipe.dtype)
    size = size_of(layout) / 1e6
    lines = [f"{recipe.method}: {len(layout)} parameters, {size:,.1f} MB in shards of {recipe.max_shard_size}"]
    for name, (shape, dtype) in layout.items():
        kept = name not in inputs.floating or keeps_pivot(recipe, name)
        weights = None if kept else handed_over(recipe, groups, name, len(shape)).get("weights")
        shown = ", ".join(f"{w:.4f}" for w in weights) if weights else "pivot" if kept or groups else "by element"
        lines.append(f"  {name}  {tuple(shape)}  {str(dtype).removeprefix('torch.')}  {shown}")
    return "\n".join(lines)
