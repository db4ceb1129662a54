"""Groups of parameters, from their names alone."""

from __future__ import annotations

import re

GRANULARITIES = ("model", "layer", "module", "matrix", "parameter")
BLOCK = re.compile(r"^(.*?\.\d+)\.([^.]+)")  # first number in a name: the decoder block, whatever the family calls it


def group_of(name: str, granularity: str) -> str:
    """The group of a parameter. Embeddings, final norm and lm_head are groups of their own (except ``model``)."""
    block = BLOCK.match(name)
    if granularity == "model":
        return "model"
    if granularity in ("matrix", "parameter") or block is None:
        return name
    return block[1] if granularity == "layer" else f"{block[1]}.{block[2]}"
