"""What a config may hold: every key of ``conf/`` with its type, range and choices. `fusechat.app.settings` checks it.

A section is a config group, or the root. Names chosen from a family (``loss.kind``, …) are `registry`'s to know; what
only an opened input can decide (a vocabulary, a context) is its stage's. A new key of conf/ gets its line here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from annotated_types import Len

from fusechat.app.schema.inputs import Chat, Logger, Paths, Pivot, Source
from fusechat.app.schema.stages import (
    Alignment,
    Evaluation,
    Extract,
    Judge,
    Merge,
    Mutual,
    Pipeline,
    Preview,
    Publish,
    Report,
    Search,
    Store,
    Tiny,
    TokenMap,
)
from fusechat.app.schema.training import Callbacks, Data, Fusion, Lora, Loss, Optimizer, Trainer, Validation
from fusechat.app.schema.values import HubId, Label, Name, Path, Section, Seed, Sources


class Config(Section, total=False):
    """The root."""

    stage: str
    output_dir: Path
    output_file: Path | None
    experiment_name: Label
    seed: Seed
    imports: Sequence[str]
    overwrite: bool
    accept_changes: bool
    wait: bool
    verify: Literal["always", "cached"]
    precision_loss: Literal["refuse", "accept"]
    models: Mapping[str, Path] | None
    sources: Sources
    run_name: Name
    target: Path | None
    targets: Sequence[Path]
    model: Path | None
    runs: Annotated[Sequence[Path], Len(1)] | None
    ckpt_path: Path | None
    gradient_checkpointing: bool
    answers: Path
    baseline: Path | None
    questions: Path | None
    first: Path | None
    second: Path | None
    repo: HubId | None
    paths: Paths
    pivot: Pivot
    source: Source
    chat: Chat
    extract: Extract
    store: Store
    token_map: TokenMap
    alignment: Alignment
    fusion: Fusion
    loss: Loss
    optimizer: Optimizer
    data: Data
    validation: Validation
    lora: Lora
    trainer: Trainer
    callbacks: Callbacks
    logger: Logger
    merge: Merge
    evaluation: Evaluation
    report: Report
    tiny: Tiny
    pipeline: Pipeline
    search: Search
    mutual: Mutual
    preview: Preview
    judge: Judge
    publish: Publish
