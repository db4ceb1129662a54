"""mergekit's recipes (https://github.com/arcee-ai/mergekit) read as recipes of ours, for the methods that both know.

A recipe is YAML: ``models`` or ``slices`` of layers, ``merge_method``, ``base_model``, ``dtype``, and ``parameters`` of
the whole, of a slice or of a model (see `gradients`). What is not supported is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError, one_of
from fusechat.app.verbs import near
from fusechat.merging.gradients import SHARED, Level, Shared, Slice, Source, patterns_of, settings_at
from fusechat.merging.groups import layers_in
from fusechat.merging.stack import Blocks, stacked_names
from fusechat.models.checkpoints import LazyCheckpoint
from fusechat.models.hub import local_model

KEYS = ("models", "slices", "merge_method", "base_model", "dtype", "out_dtype", "parameters", "tokenizer_source")
IGNORED = ("int8_mask",)  # decides what memory mergekit takes, not the result


def read(file: str | Path) -> dict[str, Any]:
    """The arguments of `Recipe` that a mergekit recipe stands for; models of the Hub are downloaded.

    Raises `UserError` for what is no recipe, and for methods, keys and parameters that are not supported.
    """
    text, content, told = _loaded(file)
    shared = SHARED[content["merge_method"]]
    whole, given = _level(content, shared, told), _slices(content, shared, told)
    models = list(dict.fromkeys(source.model for part in given for source in part.sources))
    base = local_model(content["base_model"]) if content.get("base_model") else None
    targets, pivot = _targets(shared, models, base, told), base or models[0]
    checkpoint = LazyCheckpoint(pivot)
    slices = [part.until(layers_in(checkpoint)) for part in given]
    blocks = _blocks(slices, layers_in(checkpoint), targets, content["merge_method"], told)
    names = stacked_names(checkpoint, len(blocks)) if blocks else list(checkpoint)
    found = {name: settings_at(name, slices, whole, shared, targets, told) for name in names}
    return {
        "method": shared.method,
        "pivot_path": Path(pivot),
        "target_paths": [Path(target) for target in targets],
        "dtype": content.get("out_dtype") or content.get("dtype"),
        "blocks": blocks,
        "fewest": shared.fewest,
        "text": text,
        **patterns_of(found, shared, told),
    }


def _loaded(file: str | Path) -> tuple[str, Mapping[str, Any], str]:
    """A recipe's text and content, checked as far as it goes without its models; and how a message begins."""
    import yaml

    told = f"merge.recipe={file}: "
    try:
        text = Path(file).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{told}cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{told}is no mergekit recipe; merge_method, and models or slices expected")
    _refuse(content, KEYS, told)
    if ("models" in content) == ("slices" in content):
        raise UserError(f"{told}give either models or slices")
    one_of(str(content.get("merge_method")), tuple(SHARED), f"{told}merge_method")
    if content.get("tokenizer_source") not in (None, "base"):
        asked = f"tokenizer_source={content['tokenizer_source']!r}"
        raise UserError(f"{told}{asked} is not supported; the base model's tokenizer is kept (base)")
    return text, content, told


def _refuse(given: Mapping[str, Any], known: Sequence[str], told: str) -> None:
    """Raises `UserError` for a key that is not known."""
    for key in given:
        if key not in known:
            raise UserError(f"{told}{key!r} is not supported{near(str(key), known)}; known here: {', '.join(known)}")


def _level(entry: Mapping[str, Any], shared: Shared, told: str) -> Level:
    """The parameters that are given in one place. Raises `UserError` for those that the method does not have here."""
    found = dict(entry.get("parameters") or {})
    _refuse(found, (*shared.per_model, *shared.common, *shared.fixed, *IGNORED), f"{told}parameter ")
    for key, value in shared.fixed.items():
        if found.get(key, value) is not value:
            raise UserError(f"{told}{key}: {found[key]} is not supported; this method has {key}: {value} here")
    return {key: value for key, value in found.items() if key not in (*IGNORED, *shared.fixed)}


def _slices(content: Mapping[str, Any], shared: Shared, told: str) -> list[Slice]:
    """The output's slices; ``models`` are one of all layers."""
    if "models" in content:
        return [_slice(content["models"], {}, shared, told, ranged=False)]
    slices = []
    for i, part in enumerate(content["slices"] or []):
        where = f"{told}slices[{i}]: "
        _refuse(part, ("sources", "parameters"), where)
        slices.append(_slice(part.get("sources"), _level(part, shared, where), shared, where, ranged=True))
    return slices or [_slice([], {}, shared, told, ranged=True)]


def _slice(listed: Any, own: Level, shared: Shared, told: str, ranged: bool) -> Slice:
    if not listed:
        raise UserError(f"{told}no model is named")
    sources = [_source(entry, shared, told, ranged) for entry in listed]
    if len({source.stop and source.stop - source.start for source in sources}) > 1:
        raise UserError(f"{told}its sources have different numbers of layers")
    if len({source.model for source in sources}) < len(sources):
        raise UserError(f"{told}a model is named twice; give it once, with another weight")
    return Slice(sources, own)


def _source(entry: Mapping[str, Any], shared: Shared, told: str, ranged: bool) -> Source:
    _refuse(entry, ("model", "parameters", *(["layer_range"] if ranged else [])), told)
    model = entry.get("model")
    if not isinstance(model, str):
        raise UserError(f"{told}model={model!r}: expected a folder or a Hub id, owner/name or owner/name@revision")
    if "+" in model and not Path(model).exists():
        raise UserError(f"{told}model={model}: a LoRA after + is not supported; give the adapter's folder as a model")
    start, stop = entry.get("layer_range") or (0, None)
    if ranged and (stop is None or not 0 <= start < stop):
        raise UserError(f"{told}model={model} needs layer_range: [FIRST, LAST + 1]")
    return Source(local_model(model), start, stop, _level(entry, shared, told))


def _targets(shared: Shared, models: Sequence[str], base: str | None, told: str) -> list[str]:
    """What is merged, in order; where the base is what deltas are taken from, it is no target."""
    if shared.method == "slerp":
        if base not in models or len(models) != 2:
            raise UserError(f"{told}slerp takes two models, of which base_model is one")
        return sorted(models, key=lambda model: model != base)
    if shared.deltas and base is None:
        raise UserError(f"{told}base_model is missing; merge_method={shared.method} adds to it")
    return [model for model in models if not (shared.deltas and model == base)]


def _blocks(slices: Sequence[Slice], count: int, targets: Sequence[str], method: str, told: str) -> Blocks:
    """For each layer of the output the target that it is of, and its layer there; empty where layers stay in place."""
    place, moved = 0, False
    for part in slices:
        moved |= any(source.start != place for source in part.sources)
        moved |= {source.model for source in part.sources} != {source.model for source in slices[0].sources}
        place += len(part)
    if place == count and not moved:
        return []
    if method != "passthrough" or any(len(part.sources) > 1 for part in slices):
        raise UserError(
            f"{told}slices that leave out, repeat or move layers, or change models, are supported for "
            "merge_method: passthrough with one source each"
        )
    every = [(targets.index(part.sources[0].model), part.sources[0].start, len(part)) for part in slices]
    return [(target, layer) for target, start, length in every for layer in range(start, start + length)]
