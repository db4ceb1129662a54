"""The work of merge.py, from Python too: inputs opened and checked, then the whole directory written."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.outputs import RECORD, settled, stamp, whole_directory
from fusechat.app.places import writing
from fusechat.app.progress import spell
from fusechat.app.quantities import size
from fusechat.app.surroundings import check_room
from fusechat.merging.folder import fill_model, fill_store
from fusechat.merging.inputs import Inputs, open_inputs
from fusechat.merging.recipe import Recipe
from fusechat.merging.stream import describe, layout_of, size_of
from fusechat.merging.varm import GroupWeights, measured_weights
from fusechat.models.whole import write_record

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """A merged model, or delta store, in ``path``.

    groups: the weights that VaRM measured. made: False where the folder held it already, or nothing was to be written;
    then description says what would have been.
    """

    path: Path
    groups: GroupWeights = field(default_factory=dict)
    made: bool = True
    description: str = ""


def merge(
    method: str,
    pivot: str | Path,
    targets: Sequence[str | Path],
    output_dir: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    patterns: Sequence[Mapping[str, Any]] = (),
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    device: str = "cpu",
    seed: int = 0,
    overwrite: bool = False,
    dry_run: bool = False,
    record: Mapping[str, Any] | None = None,
    imports: Mapping[str, str] | None = None,
) -> Merged:
    """Merges targets of the pivot's shape into one model by a method of `fusechat.merging.METHODS`.

    pivot, targets: Hugging Face directories or Hub ids, owner/name or owner/name@revision; a target may be a delta
    store or a LoRA adapter of the pivot. settings: the method's own, the rest as its signature has them. weights: one
    per target; None is equal. patterns: [{match: regex, weights: [...]}] or [{match: regex, keep: pivot}], the first
    that fits a parameter's name counts; density, gamma, epsilon, scale, normalize and t can be given so too. dtype:
    float32, bfloat16 or float16; None stores the pivot's. device: where slices are merged: cpu, cuda or auto.
    seed: of methods that drop at random. overwrite: replaces a folder that other settings made. dry_run: writes
    nothing but describes the merge. record: what else ``fusechat.json`` is to hold. imports: name -> hash of modules
    with methods of your own; part of the fingerprint.

    Writes ``output_dir`` whole or not at all; a folder that holds this very merge is left as it is. Raises
    `UserError` for unknown methods and settings, inputs that are broken or do not belong together, and a full disk.
    """
    paths = [Path(path) for path in targets]
    options = (weights, patterns, dtype, max_shard_size, device, seed, imports)
    recipe = Recipe(method, Path(pivot), paths, settings or {}, *options)
    return make(recipe, output_dir, overwrite=overwrite, dry_run=dry_run, record=record)


def make(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    record: Mapping[str, Any] | None = None,
) -> Merged:
    """`merge`, of a recipe."""
    output, stage = Path(output_dir), "compress" if recipe.storing else "merge"
    if dry_run:
        return _make(recipe, output, overwrite=True, dry_run=True)
    with writing(output, stage, reads=(recipe.pivot_path, *recipe.target_paths)):
        return _make(recipe, output, overwrite=overwrite, record=record)


def _make(
    recipe: Recipe, output: Path, *, overwrite: bool, dry_run: bool = False, record: Mapping[str, Any] | None = None
) -> Merged:
    held = settled(output / RECORD, recipe.mark, what="merged model", keep="output_dir=DIR", overwrite=overwrite)
    if held is not None:
        return Merged(output, held.get("weights", {}), made=False)
    began = time.monotonic()
    inputs = open_inputs(recipe.pivot_path, recipe.target_paths, by_token=not recipe.storing, blocks=recipe.blocks)
    recipe.check_patterns(inputs.floating)
    if dry_run and recipe.storing:
        raise UserError(f"merge={recipe.method} has no plan to show; leave out merge.dry_run=true")
    groups = _group_weights(inputs, recipe)
    if dry_run:
        return Merged(output, groups, made=False, description=describe(inputs, recipe, groups))
    check_room(output.parent, size_of(layout_of(inputs, recipe.dtype)), "the merged model")
    with whole_directory(output, overwrite) as directory:
        if recipe.storing:
            about, digests = fill_store(inputs, recipe, directory, output.name)
        else:
            about, digests = fill_model(inputs, recipe, groups, directory, output.name)
        write_record(directory, {**stamp(recipe.mark), **about, **(record or {})}, digests)
    LOG.info(f"{_told(inputs, recipe, groups, about, output.name)}; in {spell(time.monotonic() - began)}, {output}")
    return Merged(output, groups)


def _told(inputs: Inputs, recipe: Recipe, groups: GroupWeights, about: Mapping[str, Any], name: str) -> str:
    """What was made, with the numbers that matter."""
    count = len(inputs.targets)
    if measured := about.get("measured"):
        share = 100 * measured["bytes"] / measured["target_bytes"]
        lost = measured["relative_error"]
        return f"compressed {name}: {share:.1f} % of the target; relative error of the deltas {lost:.3f}"
    layout = layout_of(inputs, recipe.dtype)
    targets = f"{count} target{'' if count == 1 else 's'}"
    made = f"merged {name}: {recipe.method} of {targets}, {len(layout)} parameters, {size(size_of(layout))}"
    known = [weights for weights in groups.values() if weights]
    if not known:
        return made
    ranges = (f"{min(column):.2f} to {max(column):.2f}" for column in zip(*known, strict=True))
    return f"{made}; weights {', '.join(ranges)}"


def _group_weights(inputs: Inputs, recipe: Recipe) -> GroupWeights:
    if "variation" not in recipe.member.needs:
        return {}
    asked = ("granularity", "variation", "weighting", "temperature", "allow_unchanged")
    return measured_weights(inputs, recipe.ordered, **{key: recipe.settings[key] for key in asked})
