"""What a merge writes: a model's folder with card and heatmap, or a delta store's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusechat.app.outputs import RECORD
from fusechat.merging.delta import write_store
from fusechat.merging.inputs import Inputs
from fusechat.merging.recipe import Recipe
from fusechat.merging.stack import stack_config
from fusechat.merging.stream import write_merged
from fusechat.merging.varm import GroupWeights
from fusechat.models.cards import CARD, Made, write_card
from fusechat.models.hub import called

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
NOT_COPIED = {CARD, RECORD, ".gitattributes"}
HEATMAP = "merge_weights.png"
Filled = tuple[dict[str, Any], Mapping[str, str]]


def fill_model(inputs: Inputs, recipe: Recipe, groups: GroupWeights, directory: Path, name: str) -> Filled:
    """Writes the merged model; returns what its record says, and the weight files' xxh3_128.

    groups: the weights measured for VaRM.
    """
    copy_companions(recipe.pivot_path, directory, recipe.dtype)
    if recipe.blocks:
        stack_config(directory, recipe.blocks)
    digests = write_merged(inputs, recipe, groups, directory)
    names = [called(path) for path in recipe.target_paths]
    roles = {"pivot": str(recipe.pivot_path)}
    roles |= {f"target {number}": str(path) for number, path in enumerate(recipe.target_paths, 1)}
    made = f"Layers of {len(names)} models, stacked." if recipe.blocks else f"Merged by {recipe.method}."
    write_card(directory, name, Made(made, roles, [*roles.values()][1:], tags=["merge", recipe.method]))
    if groups:
        from fusechat.report.frames import weights_picture  # here: matplotlib takes longer to import than some merges

        weights_picture(groups, names, directory / HEATMAP)
    about = {"stage": "merge", "name": name, "method": recipe.method, "inputs": recipe.identities}
    about |= {"recipe": recipe.text} if recipe.text else {}
    return about | {"targets": names, "weights": groups}, digests


def fill_store(inputs: Inputs, recipe: Recipe, directory: Path, name: str) -> Filled:
    """The same of a delta store."""
    (target,) = inputs.targets
    copy_companions(target.path, directory, None)
    identity = recipe.identities[str(recipe.pivot_path)]
    measured = write_store(inputs.pivot, target, directory, identity=identity, **recipe.settings)
    return {"stage": "compress", "name": name, "inputs": recipe.identities, "measured": measured}, {}


def copy_companions(model: Path, directory: Path, dtype: str | None) -> None:
    """Copies config (``dtype`` in it where given), tokenizer, chat template and generation config of a model."""
    for file in sorted(model.iterdir()):
        foreign = file.name in NOT_COPIED or file.name.startswith(".") or file.name.endswith(WEIGHTS)
        if file.is_file() and not foreign:
            shutil.copyfile(file, directory / file.name)
    config = directory / "config.json"
    if dtype and config.exists():
        content = json.loads(config.read_text())
        content["dtype" if "dtype" in content else "torch_dtype"] = dtype
        config.write_text(json.dumps(content, indent=2) + "\n")
