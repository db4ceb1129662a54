"""Sections of the config that belong to a stage each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Len, Predicate

from fusechat.app.schema.inputs import Served
from fusechat.app.schema.values import (
    Address,
    Chats,
    Count,
    DeviceMap,
    Dtype,
    Finite,
    Fraction,
    Label,
    Logprobs,
    Name,
    Natural,
    NonNegative,
    Path,
    Place,
    Portion,
    Positive,
    Regex,
    Says,
    Scalar,
    Section,
    Seed,
    Share,
    Size,
    Template,
    Texts,
    Tokens,
    are_distinct,
)


class Tiny(Section, total=False):
    fusion_chats: Count
    test_chats: Count
    validation_chats: Natural
    train_chats: Count
    wrong_fraction: Share
    width: Count
    layers: Count
    heads: Count
    batch_size: Count
    lr: Positive
    models: Mapping[str, TinyModel]
    private: Mapping[str, TinyChats] | None


class TinyModel(Section, total=False):
    kind: Literal["llama", "gpt_neox", "qwen2", "mixtral"]
    vocab_size: Annotated[int, Ge(300)]
    steps: Count
    mixture: Mapping[str, NonNegative] | None
    width: Count


class TinyChats(Section, total=False):
    chats: Count
    mixture: Mapping[str, NonNegative] | None


class Pipeline(Section, total=False):
    steps: Annotated[
        Annotated[Sequence[str], Len(1)] | Literal["auto"],
        Says("auto, or a list of commands, e.g. [tiny,'extract source=a,b']"),
    ]
    sources: Sequence[Name]
    rules: Sequence[str]
    sft: Natural
    many_to_one: bool
    merges: Sequence[str]
    add: Sequence[str]
    dry_run: bool


class Placement(Section, total=False):
    accelerator: Place
    devices: Count | Literal["auto"]


class Extract(Section, total=False):
    kind: str
    top_k: Count
    top_p: Portion
    draws: Count
    tokens_per_batch: Count
    rows_per_shard: Count
    max_bad_fraction: Share
    trainer: Placement


class Store(Section, total=False):
    logprobs: Logprobs


class TokenMap(Section, total=False):
    name: str


class Alignment(Section, total=False):
    sequence: str
    unmatched: Literal["gold", "skip"]
    num_proc: Count


class PerParameter(Section, total=False):
    """Settings of methods that patterns may give other values."""

    density: Portion | Annotated[Sequence[Portion], Len(1)]
    gamma: Fraction | Annotated[Sequence[Fraction], Len(1)]
    epsilon: Fraction
    scale: Finite
    normalize: bool
    filter_wise: bool
    t: Share


class Pattern(PerParameter, total=False):
    match: Regex
    weights: Sequence[Finite]
    keep: Literal["pivot"]


class Merge(PerParameter, total=False):
    """Keys of every method of ours."""

    name: Name
    method: str
    recipe: Path | None
    weights: Annotated[Sequence[Finite], Len(1)] | None
    patterns: Sequence[Pattern]
    dtype: Literal["float32", "bfloat16", "float16"] | None
    max_shard_size: Size
    dry_run: bool
    device: Place
    consensual: bool
    select: Literal["weights", "deltas"]
    granularity: Literal["model", "layer", "module", "matrix", "parameter"]
    variation: Literal["square", "abs"]
    weighting: Literal["share", "softmax"]
    temperature: Positive
    allow_unchanged: bool
    ratio: Positive
    calibration: Finite


class MutualClient(Section, total=False):
    path: Path
    chats: Chats


class Mutual(Section, total=False):
    method: str
    name: Name
    rounds: Count
    epochs: Count
    timeout: Positive | None
    clients: Mapping[str, MutualClient] | None
    side: Name | None
    round: Natural | None


class Search(Section, total=False):
    trials: Count
    device: Place
    device_map: DeviceMap
    folder: Path
    batch_size: Count
    methods: Annotated[Sequence[str], Len(1), Predicate(are_distinct), Says("a list of merge methods, each once")]
    space: Mapping[str, Mapping[str, Annotated[Sequence[Scalar], Len(1)]]]


class Evaluation(Served, total=False):
    kind: str
    file: Path
    chats: Chats
    chats_seed: Seed
    questions: Path
    split: str
    limit: Count | None
    template: Template
    max_length: Tokens
    generate: bool
    max_new_tokens: Count
    batch_size: Count | Literal["auto"]
    dtype: Dtype
    device_map: DeviceMap
    trust_remote_code: bool
    temperature: NonNegative
    tasks: Texts
    include_path: Path | None
    num_fewshot: Natural | None
    apply_chat_template: bool
    device: Place | None


class Report(Section, total=False):
    metric: str
    labels: Annotated[Sequence[str], Len(1), Predicate(are_distinct), Says("a list of names, each once")] | None
    published: Path | None
    baseline: str | None
    workspace: bool


class Preview(Section, total=False):
    show: Natural
    count: Count | None


class Judge(Section, total=False):
    base_url: Address
    model: Label
    key_env: str
    repeats: Count
    temperature: NonNegative
    max_tokens: Count
    parallel: Count
    retries: Natural
    wait: NonNegative
    tries: Count
    max_bad_fraction: Share
    suffix: str


class Publish(Section, total=False):
    dry_run: bool
    private: bool
    message: str
