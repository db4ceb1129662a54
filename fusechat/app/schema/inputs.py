"""Sections of the config that every stage shares: places, models, chats, logging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fusechat.app.schema.values import (
    Address,
    Attention,
    Chats,
    Count,
    DeviceMap,
    Dtype,
    Label,
    Name,
    Natural,
    NonNegative,
    Path,
    Section,
    Seed,
    Template,
    Tokens,
)


class Paths(Section, total=False):
    root: Path
    experiment: Path
    logs: Path


class Served(Section, total=False):
    """Keys of whatever may be asked for a model behind a server."""

    engine: Literal["transformers", "server", "text_server"]
    base_url: Address | None
    model: Label | None
    key_env: str
    requests: Count
    retries: Natural
    wait: NonNegative


class Pivot(Section, total=False):
    name: Name
    path: Path
    revision: str | None
    dtype: Dtype
    attn_implementation: Attention
    trust_remote_code: bool
    load_in: Literal["8bit", "4bit"] | None


class Source(Pivot, Served, total=False):
    device_map: DeviceMap


class Chat(Section, total=False):
    path: Chats
    seed: Seed
    format: str | None
    name: str | None
    split: str
    limit: Count | None
    streaming: bool
    template: Template
    max_length: Tokens
    end_of_turn: bool
    train_on: Literal["all", "last"]


class Logger(Section, total=False):
    kind: Literal["csv", "wandb", "none"]
    project: str
    entity: str | None
    offline: bool
    tags: Sequence[Label]
    upload: bool
