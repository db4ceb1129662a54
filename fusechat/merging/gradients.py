"""What a mergekit recipe says of each parameter: values, gradients over layers, filters; and the methods both know."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fusechat.app.errors import UserError
from fusechat.merging.groups import is_embedding, layer_of, renumbered

Level = Mapping[str, Any]  # parameters as a recipe gives them in one place: name -> setting
Known = Mapping[str, tuple[str, Any]]  # mergekit's parameter -> our setting, and mergekit's default (...: it is needed)
Settings = dict[str, Any]  # ours of one parameter: setting -> value, or a list with one value per target


@dataclass(frozen=True)
class Shared:
    """A method that both know.

    per_model, common: its parameters, of each model or of the merge. fixed: those that cannot be chosen here.
    settings: ours that are always so. deltas: whether the base is no target, but what deltas are taken from. fewest:
    how many targets it needs.
    """

    method: str
    per_model: Known = field(default_factory=dict)
    common: Known = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    deltas: bool = True
    fewest: int = 1


WEIGHT: Known = {"weight": ("weights", ...)}
DENSITY: Known = {**WEIGHT, "density": ("density", 1.0)}
MAGNITUDE: Known = {**DENSITY, "epsilon": ("epsilon", 0.15)}
OUTLIERS: Known = {**DENSITY, "gamma": ("gamma", 0.01)}
SUM: Known = {"lambda": ("scale", 1.0), "normalize": ("normalize", False)}
MEAN: Known = {"lambda": ("scale", 1.0), "normalize": ("normalize", True)}
KEPT, RESCALED = {"rescale": False}, {"rescale": True}
AGREEING, PLAIN = {"consensual": True}, {"consensual": False}
SHARED = {  # mergekit's name -> how it is said here
    "linear": Shared("linear", WEIGHT, {"normalize": ("normalize", True)}, deltas=False),
    "slerp": Shared("slerp", common={"t": ("t", ...)}, deltas=False, fewest=2),
    "task_arithmetic": Shared("task_arithmetic", WEIGHT, SUM, KEPT),
    "ties": Shared("ties", DENSITY, MEAN, KEPT),
    "dare_linear": Shared("dare", DENSITY, SUM, RESCALED, PLAIN),
    "dare_ties": Shared("dare", DENSITY, SUM, RESCALED, AGREEING),
    "della": Shared("della", MAGNITUDE, MEAN, RESCALED, AGREEING),
    "della_linear": Shared("della", MAGNITUDE, SUM, RESCALED, PLAIN),
    "breadcrumbs": Shared("breadcrumbs", OUTLIERS, SUM, KEPT),
    "sce": Shared("sce", common={"select_topk": ("density", 1.0)}, settings={"select": "deltas"}, fewest=2),
    "model_stock": Shared("model_stock", common={"filter_wise": ("filter_wise", False)}, fewest=2),
    "passthrough": Shared("linear", {"scale": ("weights", 1.0)}, settings={"normalize": False}, deltas=False),
}


@dataclass(frozen=True)
class Source:
    """Layers start .. stop (None: all) of a model in an output slice, and the parameters given there."""

    model: str
    start: int
    stop: int | None
    parameters: Level


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the output, and the parameters given for them."""

    sources: Sequence[Source]
    parameters: Level

    def __len__(self) -> int:
        return (self.sources[0].stop or 0) - self.sources[0].start

    def until(self, count: int) -> Slice:
        """The same with its layers counted, where all ``count`` were meant."""
        return replace(self, sources=[replace(s, stop=count if s.stop is None else s.stop) for s in self.sources])


def settings_at(
    name: str, slices: Sequence[Slice], whole: Level, shared: Shared, targets: Sequence[str], told: str
) -> Settings:
    """Our settings of one parameter of the output. whole: parameters of the recipe. told: how a message begins.

    What lies outside the blocks goes with the first slice (embeddings) or the last, at the beginning of gradients.
    """
    layer, first = layer_of(name), 0
    part, t = slices[0 if is_embedding(name) else -1], 0.0
    if layer is not None:
        for part in slices:
            if layer < first + len(part):
                break
            first += len(part)
        t = (layer - first) / (len(part) - 1) if len(part) > 1 else 1.0
    found: Settings = {}
    for key, (ours, default) in shared.common.items():
        found[ours] = _looked_up(key, name, [part.parameters, whole], t, default, told)
    for key, (ours, default) in shared.per_model.items():
        values = []
        for source in part.sources:
            if source.model in targets:
                own = name if layer is None else renumbered(name, source.start + layer - first)
                values.append(_looked_up(key, own, [source.parameters, part.parameters, whole], t, default, told))
        found[ours] = values
    return found


def _looked_up(key: str, name: str, levels: Sequence[Level], t: float, default: Any, told: str) -> Any:
    """A parameter's value from the first level that has one. Raises `UserError` where it is needed and nowhere."""
    for level in levels:
        if key in level and (value := value_at(level[key], name, t)) is not None:
            return value
    if default is ...:
        raise UserError(f"{told}parameter {key!r} is missing for {name}; give it to each model, or to the whole")
    return default


def value_at(setting: Any, name: str, t: float) -> Any:
    """A setting's value for a parameter in a layer at ``t``, 0 (the first) to 1; None where no filter fits its name."""
    if not isinstance(setting, list):
        return setting
    if all(isinstance(value, (int, float)) for value in setting):
        place = t * (len(setting) - 1)
        left = int(place)
        right = min(len(setting) - 1, left + 1)
        return (1 - (place - left)) * setting[left] + (place - left) * setting[right]
    for entry in setting:
        if not isinstance(entry, dict) or "value" not in entry:
            return setting[int(t * (len(setting) - 1))]
        if entry.get("filter") in (None, "*") or entry["filter"] in name:
            return value_at(entry["value"], name, t)
    return None


def patterns_of(found: Mapping[str, Settings], shared: Shared, told: str) -> dict[str, Any]:
    """The arguments of `Recipe` that say the same: settings, weights, and patterns for parameters with others."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name, settings in found.items():
        alike[repr(settings)].append(name)
    groups = [(found[names[0]], names) for names in alike.values()]
    merged = [(s, names) for s, names in groups if not _keeps_base(s, shared)]
    if not merged:
        raise UserError(f"{told}every weight is zero: the merged model would be the base model")
    plain, _ = max(merged, key=lambda group: len(group[1]))
    patterns = []
    for settings, names in groups:
        match = {"match": f"^({'|'.join(map(re.escape, names))})$"}
        if _keeps_base(settings, shared):
            patterns.append(match | {"keep": "pivot"})
        elif settings is not plain:
            patterns.append(match | _single(settings, told))
    plain = _single(plain, told)
    weights = plain.pop("weights", None)
    return {"settings": {**shared.settings, **plain}, "weights": weights, "patterns": patterns}


def _keeps_base(settings: Settings, shared: Shared) -> bool:
    """Whether nothing is added to the base."""
    return shared.deltas and "weights" in settings and not any(settings["weights"])


def _single(settings: Settings, told: str) -> Settings:
    """With one value for what our methods know for all targets together."""
    found = dict(settings)
    if "epsilon" in found:
        if any(not math.isclose(value, found["epsilon"][0]) for value in found["epsilon"]):
            raise UserError(f"{told}epsilon differs between models, which is not supported; give one for all")
        found["epsilon"] = found["epsilon"][0]
    return found
