"""Ragged rows of token ids -> one rectangle with its mask. The only place where rows are padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor


def pad(rows: Sequence[Any], value: int = 0, side: Literal["right", "left"] = "right") -> tuple[Tensor, Tensor]:
    """B rows of integers (lists or arrays) of at most T -> ids [B, T] and mask [B, T], int64; the mask is 1 on tokens.

    T is the length of the longest row, at least 1: no model takes an empty sequence. side: where ``value`` fills up.
    """
    width = max([1, *(len(row) for row in rows)])
    ids = np.full((len(rows), width), value, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for b, row in enumerate(rows):
        first = 0 if side == "right" else width - len(row)
        ids[b, first : first + len(row)] = row
        mask[b, first : first + len(row)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
