"""Groups of parameters, from their names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

GRANULARITIES = ("model", "layer", "module", "matrix", "parameter")
BLOCK = re.compile(r"^(.*?\.\d+)\.([^.]+)")  # first number in a name: the decoder block, whatever the family calls it
NUMBER = re.compile(r"^(.*?\.)(\d+)(\..*)$")
EMBEDDING = re.compile(r"(^|\.)(embed(?!_out)|wte|wpe|word_embed|tok_embed)")


def group_of(name: str, granularity: str) -> str:
    """The group of a parameter. Embeddings, final norm and lm_head are groups of their own (except ``model``)."""
    block = BLOCK.match(name)
    if granularity == "model":
        return "model"
    if granularity in ("matrix", "parameter") or block is None:
        return name
    return block[1] if granularity == "layer" else f"{block[1]}.{block[2]}"


def layer_of(name: str) -> int | None:
    """The number of the decoder block that a parameter is of; None outside the blocks."""
    found = NUMBER.match(name)
    return int(found[2]) if found else None


def renumbered(name: str, layer: int) -> str:
    """The same parameter of another block."""
    return NUMBER.sub(rf"\g<1>{layer}\g<3>", name)


def layers_in(names: Iterable[str]) -> int:
    """How many decoder blocks there are."""
    return 1 + max((layer_of(name) or 0 for name in names if layer_of(name) is not None), default=-1)


def is_embedding(name: str) -> bool:
    """Whether a parameter outside the blocks stands before them."""
    return EMBEDDING.search(name) is not None
