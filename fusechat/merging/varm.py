"""VaRM: merge weights from how much each group of parameters changed (FuseChat, arXiv 2402.16107, equation of section 3.3).

W[j, m] = mean_m(delta_j^2) / sum_j mean_m(delta_j^2), always against the pivot. Groups come from parameter names alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fusechat.app.errors import UserError, one_of
from fusechat.merging.slices import Slices
from fusechat.models.checkpoints import LazyCheckpoint

GRANULARITIES = ("model", "layer", "module", "matrix", "parameter")
BLOCK = re.compile(r"^(.*?\.\d+)\.([^.]+)")  # first number in a name: the decoder block, whatever the family calls it
CACHE = ".fusechat-variation.json"


@dataclass(frozen=True)
class Change:
    """How far one tensor of a target is from the pivot's: sum of delta^2, of |delta|, and the number of elements."""

    square: float
    absolute: float
    size: int


def group_of(name: str, granularity: str) -> str:
    """The group a parameter belongs to. Embeddings, final norm and lm_head are groups of their own (except ``model``)."""
    one_of(granularity, GRANULARITIES, "merge.granularity")
    block = BLOCK.match(name)
    if granularity == "model":
        return "model"
    if granularity in ("matrix", "parameter") or block is None:
        return name
    return block[1] if granularity == "layer" else f"{block[1]}.{block[2]}"


def group_weights(
    changes: Sequence[Mapping[str, Change]],
    granularity: str,
    variation: str = "square",
    weighting: str = "share",
    temperature: float = 1.0,
) -> dict[str, list[float] | None]:
    """Group -> one weight per target (sum 1), or None for a group that no target changed.

    variation: ``square`` (published) or ``abs``. weighting: ``share`` (published), or ``softmax`` of the variations over
    their mean and the temperature.
    """
    one_of(variation, ("square", "abs"), "merge.variation")
    one_of(weighting, ("share", "softmax"), "merge.weighting")
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(changes))
    sizes: dict[str, int] = defaultdict(int)
    for name in changes[0]:
        group = group_of(name, granularity)
        sizes[group] += changes[0][name].size
        for j, change in enumerate(changes):
            sums[group][j] += change[name].square if variation == "square" else change[name].absolute
    return {
        group: _normalised([s / sizes[group] for s in values], weighting, temperature) for group, values in sums.items()
    }


def _normalised(variations: list[float], weighting: str, temperature: float) -> list[float] | None:
    total = sum(variations)
    if total == 0:
        return None
    if weighting == "softmax":
        mean = total / len(variations)
        peak = max(variations)
        variations = [math.exp((v - peak) / (temperature * mean)) for v in variations]
        total = sum(variations)
    return [v / total for v in variations]


def measure(
    pivot: LazyCheckpoint,
    target: LazyCheckpoint,
    names: Iterable[str],
    key: str,
    aligned: Mapping[str, Tensor] | None = None,
) -> dict[str, Change]:
    """One pass over a target: the change of every tensor. Results are kept beside the target under ``key``, both contents' hashes.

    aligned: tensors already matched by token, in place of the target's own. Raises `UserError` for NaN or inf.
    """
    file = target.path / CACHE
    held = json.loads(file.read_text()) if file.exists() else {}
    if key in held:
        return {name: Change(*entry) for name, entry in held[key].items()}
    found = {name: _change(pivot, target, name, (aligned or {}).get(name)) for name in names}
    held[key] = {name: [c.square, c.absolute, c.size] for name, c in found.items()}
    with contextlib.suppress(OSError):  # a read-only target: measured again next time
        file.write_text(json.dumps(held))
    return found


def _change(pivot: LazyCheckpoint, target: LazyCheckpoint, name: str, replaced: Tensor | None) -> Change:
    square = absolute = 0.0
    own = pivot.tensor(name)
    for (delta,) in Slices(own, [target.tensor(name) if replaced is None else replaced]).deltas():
        absolute += float(delta.norm(1))
        square += float(delta.dot(delta))
    if not math.isfinite(square):
        raise UserError(f"{target.path}: {name} holds NaN or inf; the target is broken, train or download it again")
    return Change(square, absolute, own.numel())
