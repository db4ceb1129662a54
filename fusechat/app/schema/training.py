"""Sections of the config that decide a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from fusechat.app.schema.values import (
    Betas,
    Chats,
    Count,
    Device,
    Devices,
    Fraction,
    Limit,
    MissingMass,
    Name,
    Natural,
    NonNegative,
    Path,
    Positive,
    Precision,
    Schedule,
    Section,
    Seed,
    Share,
    Steps,
    Texts,
    Tokens,
)


class Fusion(Section, total=False):
    rule: str
    level: Literal["sequence", "token"]
    metric: Literal["bits_per_byte", "nats_per_token"]
    include_pivot: bool
    empty: Literal["skip", "pivot"]


class Loss(Section, total=False):
    kind: str
    lm_weight: Share
    schedule: Literal["hard", "hard_and_decay", "soft"]
    temperature: Positive
    student_temperature: Positive
    missing_mass: MissingMass
    chunked: bool


class Optimizer(Section, total=False):
    lr: Positive
    betas: Betas
    weight_decay: NonNegative
    warmup_ratio: Share
    schedule: Schedule


class Data(Section, total=False):
    global_batch: Count
    batch_size: Count | None
    validation_fraction: Fraction
    split_seed: Seed
    shuffle_seed: Seed
    num_workers: Natural
    bucket: Count
    max_tokens: Tokens | None
    packing: bool


class Validation(Section, total=False):
    path: Chats | None


class Lora(Section, total=False):
    enabled: bool
    adapter: Path | None
    r: Count
    lora_alpha: Positive
    target_modules: str | Texts
    lora_dropout: Fraction
    modules_to_save: Sequence[str] | None
    bias: Literal["none", "all", "lora_only"]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    init_lora_weights: bool | str
    layers_to_transform: Natural | Sequence[Natural] | None
    layers_pattern: str | Sequence[str] | None
    rank_pattern: Mapping[str, Count]
    alpha_pattern: Mapping[str, Positive]
    exclude_modules: str | Sequence[str] | None


class Trainer(Section, total=False):
    """Lightning's own keys, but those that fusechat gives itself; and how many minutes a rank waits for others."""

    accelerator: Device
    devices: Devices
    num_nodes: Count
    strategy: Name
    precision: Precision
    max_epochs: Steps | None
    min_epochs: Natural | None
    max_steps: Steps
    min_steps: Natural | None
    max_time: str | Mapping[str, int] | None
    accumulate_grad_batches: Count
    gradient_clip_val: NonNegative | None
    gradient_clip_algorithm: Literal["norm", "value"] | None
    log_every_n_steps: Count
    enable_model_summary: bool
    limit_train_batches: Limit
    limit_val_batches: Limit
    limit_test_batches: Limit
    limit_predict_batches: Limit
    fast_dev_run: bool | Count
    overfit_batches: Natural | Share
    val_check_interval: Count | Share | None
    check_val_every_n_epoch: Count | None
    num_sanity_val_steps: Natural | Literal[-1] | None
    deterministic: bool | Literal["warn"] | None
    benchmark: bool | None
    detect_anomaly: bool
    profiler: Literal["simple", "advanced", "pytorch"] | None
    sync_batchnorm: bool
    timeout: Positive


class Callbacks(Section, total=False):
    checkpoint_every_n_steps: Count | None
    early_stopping: Count | None
    samples: Natural
    progress_bar: bool
    keep_checkpoints: bool
