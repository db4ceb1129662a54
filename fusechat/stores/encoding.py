"""How a store keeps its columns: as few bytes a token as reading at full speed allows.

Every ``encode_`` has its ``decode_``.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
UINT8_STEP = 0.05  # nats per level: total variation error <= step / 4 = 0.0125, range 12.75 nats
INSIDE, MORE = 255, 254  # codes of `encode_steps`


def narrowest(largest: int) -> npt.DTypeLike:
    """The narrowest unsigned integer that holds ``largest``."""
    return np.min_scalar_type(largest)


def encode_logprobs(logprobs: npt.NDArray[np.float32], kind: str) -> Array:
    """fp32 log-probabilities -> what the store keeps: ``float16``, or ``uint8`` in steps of `UINT8_STEP` nats."""
    if kind == "float16":
        return logprobs.astype(np.float16)
    levels: Array = np.rint(np.clip(logprobs * np.float32(-1 / UINT8_STEP), 0, 255)).astype(np.uint8)
    return levels


def decode_logprobs(stored: Array) -> npt.NDArray[np.float32]:
    """The inverse of `encode_logprobs`, by the array's own type."""
    values = stored.astype(np.float32)
    return values * np.float32(-UINT8_STEP) if stored.dtype == np.uint8 else values


def encode_runs(positions: Array) -> Array:
    """Increasing positions as runs, first and end of each in turn: a response is one run and costs nothing a token."""
    if not len(positions):
        return np.empty(0, np.int64)
    cuts = np.flatnonzero(np.diff(positions) != 1)
    return np.stack([positions[[0, *(cuts + 1)]], positions[[*cuts, -1]] + 1], 1).reshape(-1).astype(np.int64)


def decode_runs(runs: Array) -> npt.NDArray[np.int64]:
    """The inverse of `encode_runs`."""
    if len(runs) == 2:
        return np.arange(runs[0], runs[1], dtype=np.int64)
    return np.concatenate([np.empty(0, np.int64), *(np.arange(a, b, dtype=np.int64) for a, b in runs.reshape(-1, 2))])


def encode_steps(boundaries: Array) -> Array:
    """Non-decreasing boundaries (-1: inside a character) as uint8 steps.

    `INSIDE` marks -1, `MORE` a step that the next entry ends.
    """
    known = np.flatnonzero(boundaries >= 0)
    steps = np.zeros(len(boundaries), np.int64)
    steps[known] = np.diff(boundaries[known], prepend=0)
    more = steps // MORE
    codes = np.where(boundaries < 0, INSIDE, steps % MORE)
    out = np.full(len(codes) + int(more.sum()), MORE, np.uint8)
    out[np.arange(len(codes)) + np.cumsum(more)] = codes
    return out


def decode_steps(steps: Array) -> npt.NDArray[np.int64]:
    """The inverse of `encode_steps`."""
    inside = steps == INSIDE
    boundaries: npt.NDArray[np.int64] = np.cumsum(np.where(inside, 0, steps), dtype=np.int64)
    boundaries[inside] = -1
    kept: npt.NDArray[np.int64] = boundaries[steps != MORE]
    return kept


def encode_counts(counts: Array) -> Array:
    """Entries per position; a single number where all positions have as many."""
    return counts[:1] if len(counts) and (counts == counts[0]).all() else counts


def decode_counts(stored: Array, positions: int) -> Array:
    """The inverse of `encode_counts` for a chat of so many positions (a view where one number stands for all)."""
    return np.broadcast_to(stored, positions) if len(stored) == 1 else stored


def encode_mask(mask: npt.NDArray[np.bool_]) -> str:
    """A mask over a vocabulary as a manifest holds it: eight tokens a byte, in base64."""
    return base64.b64encode(np.packbits(mask).tobytes()).decode()


def decode_mask(text: str, size: int) -> npt.NDArray[np.bool_]:
    """The inverse of `encode_mask` for a vocabulary of so many tokens."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=size).astype(bool)


DECODE: dict[str, Callable[[Array], Array]] = {"positions": decode_runs, "boundaries": decode_steps}
