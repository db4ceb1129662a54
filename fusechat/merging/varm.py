"""VaRM: merge weights from how much each group of parameters changed (FuseChat, arXiv 2402.16107, section 3.3).

W_{j,m} = mean_m(δ_j²) / Σ_i mean_m(δ_i²), θ[m] = Σ_j W_{j,m} θ_j[m], with δ_j = θ_j − θ_0 always against the pivot.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fusechat.app.errors import UserError, one_of
from fusechat.app.outputs import read_json, tidy, write_json
from fusechat.app.progress import bytes_progress
from fusechat.app.remembered import folder
from fusechat.merging.dense import linear
from fusechat.merging.family import METHODS, Parts, Weights
from fusechat.merging.groups import GRANULARITIES, group_of
from fusechat.merging.inputs import Inputs
from fusechat.merging.slices import Slices

BESIDE = ".fusechat-variation.json"  # in a target, of earlier versions: read, and left as it is
GroupWeights = dict[str, list[float] | None]  # group -> one weight per target (sum 1); None where no target changed it


@METHODS.register(
    "varm",
    "weights from how much each group changed (FuseChat, published: square, share, matrix)",
    needs=("variation",),
)
def varm(
    slices: Slices,
    weights: Weights | None,
    granularity: str = "matrix",
    variation: str = "square",
    weighting: str = "share",
    temperature: float = 1.0,
    allow_unchanged: bool = False,
) -> Parts:
    """θ = Σ_j w_j θ_j with the weights of the parameter's group; of each element where ``granularity=parameter``.

    A group that no target changed keeps the pivot's value. weighting, temperature, allow_unchanged: see
    `measured_weights`.
    """
    if weights is not None:
        return linear(slices, weights)
    if granularity == "parameter":
        return element_weighted(slices, 2 if variation == "square" else 1)
    return (pivot for pivot, _ in slices)


def element_weighted(slices: Slices, power: int = 2) -> Parts:
    """VaRM of single elements: w_j = |δ_j|^power / Σ_i |δ_i|^power; unchanged elements keep the pivot's value."""
    for pivot, targets in slices:
        variations = [(target - pivot).abs_().pow_(power) for target in targets]
        total = sum(variations[1:], variations[0].clone())
        merged = torch.zeros_like(pivot)
        for target, variation in zip(targets, variations, strict=True):
            merged.addcmul_(variation, target)
        unchanged = 1 - total.sign()
        yield merged.addcmul_(pivot, unchanged).div_(total.add_(unchanged))


@dataclass(frozen=True)
class Change:
    """How far one tensor of a target is from the pivot's: Σ δ², Σ |δ|, and the number of elements."""

    square: float
    absolute: float
    size: int


def measured_weights(
    inputs: Inputs,
    identities: Sequence[str],
    granularity: str,
    variation: str,
    weighting: str,
    temperature: float,
    allow_unchanged: bool,
) -> GroupWeights:
    """The groups' weights, from one pass over every target; none for ``granularity=parameter``.

    identities: hashes of pivot and targets, under which what was measured is remembered. variation:
    ``square`` (published) or ``abs``. weighting: ``share`` (published), or ``softmax`` of the variations over their
    mean and the temperature. Raises `UserError` where no target differs from the pivot, unless ``allow_unchanged``.
    """
    one_of(granularity, GRANULARITIES, "merge.granularity")
    one_of(variation, ("square", "abs"), "merge.variation")
    one_of(weighting, ("share", "softmax"), "merge.weighting")
    own, *others = identities
    changes = [change_of_target(inputs, j, f"{own}:{other}") for j, other in enumerate(others)]
    changed = any(change.square > 0 for target in changes for change in target.values())
    if not changed and not allow_unchanged:
        raise UserError(
            f"no target differs from the pivot {inputs.pivot.path}: every VaRM weight is 0/0; "
            "check targets, or pass merge.allow_unchanged=true to write the pivot again"
        )
    if granularity == "parameter":
        return {}
    means = group_variations(changes, granularity, variation)
    return {group: _normalised(values, weighting, temperature) for group, values in means.items()}


def group_variations(
    changes: Sequence[Mapping[str, Change]], granularity: str, variation: str
) -> dict[str, list[float]]:
    """Group -> mean_m(δ_j²), or mean_m(|δ_j|), of every target. changes: one per target, by parameter."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(changes))
    sizes: dict[str, int] = defaultdict(int)
    for name in changes[0]:
        group = group_of(name, granularity)
        sizes[group] += changes[0][name].size
        for j, change in enumerate(changes):
            sums[group][j] += change[name].square if variation == "square" else change[name].absolute
    return {group: [s / sizes[group] for s in values] for group, values in sums.items()}


def _normalised(variations: list[float], weighting: str, temperature: float) -> list[float] | None:
    """W_j from the targets' variations v_j: v_j / Σ v_i, or softmax of v_j / (temperature · mean v)."""
    total = sum(variations)
    if total == 0:
        return None
    if weighting == "softmax":
        mean, peak = total / len(variations), max(variations)
        variations = [math.exp((v - peak) / (temperature * mean)) for v in variations]
        total = sum(variations)
    return [v / total for v in variations]


def change_of_target(inputs: Inputs, j: int, key: str) -> dict[str, Change]:
    """The change of every tensor of target ``j``, remembered in `remembered.folder` under both contents' hashes.

    key: these, ``pivot:target``. Raises `UserError` for NaN or inf.
    """
    own, beside = folder() / "variation" / f"{key.replace(':', '-')}.json", inputs.targets[j].path / BESIDE
    tidy(own)  # of a killed merge; one that goes on in another process measures again next time
    for file in (own, beside):
        if file.exists() and (held := read_json(file).get(key)) is not None:
            return {name: Change(*entry) for name, entry in held.items()}
    found, infos = {}, inputs.pivot.infos
    with bytes_progress(f"measure target {j + 1}", sum(infos[name].bytes for name in inputs.floating)) as tell:
        for name in inputs.floating:
            found[name] = _change(inputs, j, name)
            tell(infos[name].bytes)
    for checkpoint in (inputs.pivot, inputs.targets[j]):
        checkpoint.verify()
    with contextlib.suppress(OSError):  # a read-only cache: measured again next time
        write_json(own, {key: {name: [c.square, c.absolute, c.size] for name, c in found.items()}})
    return found


def _change(inputs: Inputs, j: int, name: str) -> Change:
    square = absolute = 0.0
    slices = inputs.slices_of(j, name)
    for (delta,) in slices.deltas():
        absolute += float(delta.norm(1))
        square += float(delta.dot(delta))
    inputs.let_go(name)
    return Change(square, absolute, slices.size)
