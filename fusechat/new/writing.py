"""The text of an experiment's file: what was found stands behind the keys that it decided."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from fusechat.new.facts import Lengths, Model

STEPS = 100  # of an epoch, about, up to the published 128 chats a step


def text_of(
    name: str,
    folder: Path,
    pivot: Model,
    sources: Sequence[Model],
    own: Lengths,
    *,
    chats: object,
    tests: object,
    counts: tuple[int, int],
    template: str,
    max_length: int,
    micro_batch: int,
) -> str:
    """The YAML. own: of the chats as the pivot reads them; counts: of chats and tests; micro_batch: chats at a time."""
    targets = ", ".join(quoted(f"${{paths.experiment}}/targets/{model.name}") for model in sources)
    step = step_of(counts[0])
    said = f"{counts[0]:,} chats; the longest has {own.longest:,} tokens, {own.cut:.1%} are cut"
    said += "; native: each model reads its own format" if template == "native" else "; pivot: all read its format"
    return f"""\
# @package _global_
# python -m fusechat.pipeline --config-dir {folder} experiment={name}      made by fusechat new; yours to edit
defaults: [override /source: own, override /alignment: offsets, override /token_map: prefix, _self_]
experiment_name: {name}
pivot: {{path: {quoted(pivot.path)}}}  # {about(pivot)}
models:  # the sources
{_listed(sources)}
chat: {{path: {quoted(chats)}, template: {template}, max_length: {max_length}}}  # {said}
evaluation: {{chats: {quoted(tests)}, generate: false, batch_size: 8}}  # {counts[1]:,} chats that no training sees
targets: [{targets}]  # what merge.py merges
alignment: {{unmatched: skip}}    # no fusion loss where a source has no token that ends there; gold: as published
loss: {{lm_weight: 0.9}}          # published; less learns more from the sources, less from the chats
optimizer: {{lr: {rate_of(pivot.total)}}}         # 5e-6 is published for 7B models; smaller ones take more: try a few
trainer: {{max_epochs: 3}}        # of {math.ceil(counts[0] / step)} steps each
data: {{global_batch: {step}, batch_size: {micro_batch}}}  # chats of a step, and at most so many at a time
pipeline: {{steps: auto}}         # sft: 3, many_to_one: false, merges: [varm, linear]; pipeline.dry_run=true shows them
"""


def _listed(sources: Sequence[Model]) -> str:
    """Name and path of each, the paths one below the other."""
    width = max(len(model.name) for model in sources)
    lines = (f"{model.name}:".ljust(width + 1) + f" {quoted(model.path)}  # {about(model)}" for model in sources)
    return "\n".join(f"  {line}" for line in lines)


def about(model: Model) -> str:
    """``LlamaForCausalLM, 135 M parameters, 49,152 tokens, apache-2.0``"""
    licence = model.licence or "licence not named"
    return f"{model.kind}, {millions(model.total)} parameters, {model.vocabulary:,} tokens, {licence}"


def millions(parameters: float) -> str:
    """``0.82 M``, ``135 M``, ``7.2 B``"""
    number, unit = (parameters / 1e9, "B") if parameters >= 1e9 else (parameters / 1e6, "M")
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


def step_of(chats: int) -> int:
    """Chats of an optimizer step: about `STEPS` steps an epoch, a power of two, from 8 to the published 128."""
    return min(128, max(8, 1 << round(math.log2(max(1, chats / STEPS)))))


def rate_of(parameters: float) -> str:
    """A learning rate to begin with: the published one, that of the example with 135 M, that of the demo with 0.7 M."""
    return "5.0e-6" if parameters > 1e9 else "3.0e-5" if parameters > 1e7 else "1.0e-3"


def quoted(value: object) -> str:
    """A text, or a list of texts and mappings, as YAML reads it back inside a flow mapping."""
    return json.dumps(value, ensure_ascii=False)


def rows_of(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Chats as JSON lines."""
    return [json.dumps({"messages": row["messages"], "tag": row["tag"]}, ensure_ascii=False) for row in rows]
