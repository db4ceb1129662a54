"""Types of the values that a config may hold, with their ranges, and what a person is told to give."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Len, Lt, Predicate
from pydantic import AllowInfNan, ConfigDict
from typing_extensions import TypedDict


class Section(TypedDict, total=False):
    """Keys with their types; any may be absent, no others may be there."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[misc]


@dataclass(frozen=True)
class Says:
    """What is expected, in words, where the type alone does not tell; known: names that a misspelt one is near."""

    text: str
    known: tuple[str, ...] = ()


def is_name(text: str) -> bool:
    """Whether a text can name a folder."""
    return bool(text.strip(" .")) and "/" not in text


def is_template(text: str) -> bool:
    """Whether a chat template is one of our names or a Jinja text."""
    return text in TEMPLATES or "{" in text


def is_regex(text: str) -> bool:
    """Whether a text compiles as a regular expression."""
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def is_size(size: str | int) -> bool:
    """Whether a text is a positive size as ``max_shard_size`` has it: 5GB, 200MB, or bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:[KMG]B)?", str(size), re.I)
    return found is not None and float(found[1]) > 0


def is_address(text: str) -> bool:
    """Whether a text is the address of an endpoint."""
    return re.match(r"https?://.", text) is not None


def is_hub_id(text: str) -> bool:
    """Whether a text is a Hub id, owner/name, and no path: ``/x``, ``./x`` and ``~/x`` are paths."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None


def is_device(text: str) -> bool:
    """Whether a text names a device as torch does, or leaves it open."""
    return text in DEVICES or re.fullmatch(r"cuda:\d+", text) is not None


def is_spread(text: str) -> bool:
    """Whether a text says how a model is spread over devices."""
    return text in SPREADS or is_device(text)


def are_distinct(values: Sequence[Any]) -> bool:
    """Whether no value stands twice."""
    return all(values.index(value) == i for i, value in enumerate(values))


SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
DEVICES = ("auto", "cpu", "cuda", "mps")
TEMPLATES = ("pivot", "native", "plain")
FINITE = AllowInfNan(False)
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
Steps = Annotated[Count | Literal[-1], Says("a whole number from 1 on, or -1 for no end")]
Tokens = Annotated[int, Ge(2)]  # of a chat: one to read and one to predict
Finite = Annotated[float, FINITE]
Positive = Annotated[float, Gt(0), FINITE]
NonNegative = Annotated[float, Ge(0), FINITE]
Share = Annotated[float, Ge(0), Le(1), FINITE]
Portion = Annotated[float, Gt(0), Le(1), FINITE]  # a share that is not nothing
Fraction = Annotated[float, Ge(0), Lt(1), FINITE]  # a share that is not all
Label = Annotated[str, Len(1), Says("a name")] | int
Name = Annotated[str, Predicate(is_name), Says("a name without /")] | int
Scalar = str | bool | int | Finite
Path = Annotated[str, Len(1), Says("a path")]
Chats = Annotated[  # `fusechat.chats.mixture` knows the keys of a part
    Path | Annotated[Sequence[Path | Mapping[str, Any]], Len(1)],
    Says("a path, or a list of paths and of {path: PATH, rows: N} or {path: PATH, weight: W}"),
]
Texts = Annotated[Sequence[str], Len(1)]
HubId = Annotated[str, Predicate(is_hub_id), Says("a Hub id, owner/name")]
Address = Annotated[str, Predicate(is_address), Says("an address, http(s)://HOST/v1")]
Regex = Annotated[str, Predicate(is_regex), Says("a regular expression")]
Size = Annotated[str | int, Predicate(is_size), Says("a size, e.g. 5GB, 200MB or a number of bytes")]
Template = Annotated[str, Predicate(is_template), Says("pivot, native, plain, or a Jinja text with {{ }}", TEMPLATES)]
Sources = Annotated[Sequence[Name | None], Predicate(are_distinct), Says("a list of sources, each once, e.g. [a,b]")]
Betas = Annotated[Sequence[Fraction], Len(2, 2), Says("two numbers of [0, 1), e.g. [0.9,0.999]")]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
MissingMass = Literal["renormalize", "tail", "zero"]
Logprobs = Literal["float16", "uint8"]
Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] | HubId | None
Place = Annotated[str, Predicate(is_device), Says("auto, cpu, cuda, cuda:1 or mps", DEVICES)]
Device = Literal["cpu", "gpu", "cuda", "mps", "auto"]
Devices = Count | Literal["auto"] | Annotated[Sequence[Natural], Len(1)]
Spread = Annotated[str, Predicate(is_spread), Says("auto, balanced, sequential or a device", SPREADS)]
DeviceMap = Spread | Mapping[str, Any] | None
Limit = Count | Share | None  # batches, or their share
Schedule = Literal[  # of transformers.get_scheduler, those that need nothing more
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]
Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true", "32", "bf16", "16", 32, 16]
