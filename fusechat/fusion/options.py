"""A training's settings, as values that are checked when they are made. Nothing heavy is imported for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusechat.app import settings
from fusechat.app.parts import TARGET


@dataclass(frozen=True)
class Data:
    """What is trained on, in which order. global_batch: chats of an optimizer step; batch_size: at most so many at a
    time on a device, None: all of its part; validation_fraction: chats held out by content hash and split_seed;
    shuffle_seed: the order; bucket: steps sorted by length together, 1: none; num_workers: DataLoader processes;
    max_tokens: longer chats are an error, None: the caller's ``max_length`` decides; packing: chats share rows, which
    changes nothing but the time it takes (`fusechat.chats.padding`).
    """

    global_batch: int = 8
    batch_size: int | None = None
    validation_fraction: float = 0.05
    split_seed: int = 0
    shuffle_seed: int = 0
    num_workers: int = 0
    bucket: int = 16
    max_tokens: int | None = None
    packing: bool = False

    def __post_init__(self) -> None:
        settings.check("data", **vars(self))


@dataclass(frozen=True)
class Optimizer:
    """AdamW, published values. schedule: any name of `transformers.get_scheduler`; warmup_ratio: share of the steps.

    target: another optimizer, the dotted name of a class that is called with the parameters (with their names, where it
    has an argument ``named_parameters``), lr and ``options`` in place of betas and weight_decay. A schedule by dotted
    name is a mapping with ``_target_`` and arguments.
    """

    lr: float = 5e-6
    betas: Sequence[float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    schedule: str | Mapping[str, Any] = "cosine"
    target: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings.check("optimizer", **vars(self))

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Optimizer:
        """From a section of the config."""
        if TARGET not in config:
            return cls(**config)
        own = {key: config[key] for key in ("lr", "warmup_ratio", "schedule") if key in config}
        options = {key: value for key, value in config.items() if key not in (*own, TARGET)}
        return cls(**own, target=config[TARGET], options=options)

    @property
    def settings(self) -> dict[str, Any]:
        """The section of the config that says the same; part of the fingerprint."""
        same = {"lr": self.lr, "betas": self.betas, "weight_decay": self.weight_decay}
        own = same if self.target is None else {"lr": self.lr, **self.options, TARGET: self.target}
        return {**own, "warmup_ratio": self.warmup_ratio, "schedule": self.schedule}


@dataclass(frozen=True)
class Callbacks:
    """What goes on beside training. checkpoint_every_n_steps: None: at the end of an epoch alone; early_stopping:
    validations without improvement before training stops; samples: held-out prompts that are answered after every
    validation; keep_checkpoints: of a finished run too.
    """

    checkpoint_every_n_steps: int | None = 100
    early_stopping: int | None = None
    samples: int = 0
    progress_bar: bool = True
    keep_checkpoints: bool = False

    def __post_init__(self) -> None:
        settings.check("callbacks", **vars(self))
