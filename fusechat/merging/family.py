"""The family of merge methods, and the arithmetic that several of them share.

A method is a function of one parameter: slices of pivot and targets in, slices of the merged tensor out, in fp32. In
the formulas θ_0 is the pivot, θ_j target j of J, δ_j = θ_j − θ_0, w_j its weight. What a method must know of the
whole tensor it gathers in passes over the slices, so that memory does not grow with the tensor. Methods read no files
and change no inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.app.registry import Family, Member

Weights = Sequence[float]
Parts = Iterator[Tensor]  # the merged tensor's slices, in order
NEEDS = {  # what a method can ask for beside its own settings: need -> what it is called with
    "weights": "weights: one per target, as merge.weights or a pattern gives them",
    "variation": "weights: the group's, by how much the targets changed it; None where there are none",
    "density": "density: one per target, also where the setting is a single value",
    "gamma": "gamma: one per target, also where the setting is a single value",
    "seed": "seed: the run's seed and a hash of the parameter's name",
    "name": "name: the parameter's",
    "transposed": "transposed: whether the matrix's rows are the vectors (embeddings), not its columns",
    "store": "nothing more; of one target it returns the tensors that stand for a matrix in a delta store",
}
METHODS = Family("merge.method", needs=tuple(NEEDS))


def settings_of(member: Member, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a method: those given, the others as its signature has them.

    Raises `UserError` for one that is unknown or missing.
    """
    handed = {"weights" if need == "variation" else need for need in member.needs} - {"density", "gamma"}
    slices, *parameters = inspect.signature(member.function).parameters.values()
    known = {p.name: p.default for p in parameters if p.name not in handed}
    if unknown := given.keys() - known.keys():
        raise UserError(f"merge={member.name} has no setting {min(unknown)!r}; it knows: {', '.join(known) or 'none'}")
    if missing := [name for name, default in known.items() if default is slices.empty and name not in given]:
        raise UserError(f"merge={member.name} needs the setting merge.{missing[0]}")
    return {name: given.get(name, default) for name, default in known.items()}


def combined(tensors: Sequence[Tensor], weights: Weights) -> Tensor:
    """Σ_j w_j · tensor_j."""
    merged = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        merged.add_(tensor, alpha=weight)
    return merged


def total_of(weights: Weights) -> float:
    """Σ_j w_j. Raises `UserError` where nothing can be divided by it."""
    total = sum(weights)
    if abs(total) < 1e-8:
        raise UserError(f"the weights {list(weights)} sum to zero; set merge.normalize=false")
    return total
