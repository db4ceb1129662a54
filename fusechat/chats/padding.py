"""Ragged rows of token ids -> one rectangle: each in a row of its own, or several to a row. Nothing else pads rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Laid:
    """B rows of integers laid into a rectangle [R, T], all int64.

    ids [R, T]; mask [R, T], 1 on tokens; starts [B], each row's first place in the flattened [R * T]; positions [R, T],
    where several share a row: they begin anew with each of them, and with what is spare, by which a model tells them
    apart (`transformers.masking_utils`).
    """

    ids: Tensor
    mask: Tensor
    starts: Tensor
    positions: Tensor | None = None


Layout = Callable[[Sequence[Any], int], Laid]  # rows, and what spare places hold


def reading(ids: Tensor, mask: Tensor, positions: Tensor | None) -> dict[str, Tensor]:
    """What a model is given of a rectangle: it tells apart what shares a row only where there is no mask."""
    return {"input_ids": ids} | ({"attention_mask": mask} if positions is None else {"position_ids": positions})


def pad(rows: Sequence[Any], value: int = 0, side: Literal["right", "left"] = "right") -> tuple[Tensor, Tensor]:
    """B rows of integers (lists or arrays) of at most T -> ids [B, T] and mask [B, T], int64; the mask is 1 on tokens.

    T is the length of the longest row, at least 1: no model takes an empty sequence. side: where ``value`` fills up.
    """
    width = max([1, *(len(row) for row in rows)])
    starts = [b * width + (0 if side == "right" else width - len(row)) for b, row in enumerate(rows)]
    laid = _laid(rows, value, starts, (len(rows), width))
    return laid.ids, laid.mask


def padded(rows: Sequence[Any], value: int = 0) -> Laid:
    """Each in a row of its own, as long as the longest of them."""
    ids, mask = pad(rows, value)
    return Laid(ids, mask, torch.arange(len(rows)) * ids.shape[1])


def packed(rows: Sequence[Any], value: int = 0) -> Laid:
    """As many to a row as fit into the length of the longest, the longest first and each in the first row with room.

    So attention costs no more than over padded rows: none is longer, and there are at most as many.
    """
    return _in_rows_of(max([1, *(len(row) for row in rows)]), rows, value)


def flattened(rows: Sequence[Any], value: int = 0) -> Laid:
    """All in one row without padding, for flash attention, to which neighbours cost nothing."""
    return _in_rows_of(max(1, sum(len(row) for row in rows)), rows, value)


def layout_of(packing: bool, attn_implementation: str | None) -> Layout:
    """How chats are laid out for a model: flash attention tells chats apart in a single row alone."""
    if not packing:
        return padded
    return flattened if "flash" in (attn_implementation or "") else packed


def _in_rows_of(width: int, rows: Sequence[Any], value: int) -> Laid:
    """First fit, decreasing; equal lengths in their order."""
    filled, starts = list[int](), [0] * len(rows)  # places taken in each row so far
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index])):
        size = len(rows[index])
        row = next((r for r, taken in enumerate(filled) if taken + size <= width), len(filled))
        if row == len(filled):
            filled.append(0)
        starts[index] = row * width + filled[row]
        filled[row] += size
    laid = _laid(rows, value, starts, (max(1, len(filled)), width))
    place, begun = np.arange(laid.ids.numel()), np.zeros(laid.ids.numel(), np.int64)
    spare = [row * width + taken for row, taken in enumerate(filled) if taken < width]
    begins = [start for start, row in zip(starts, rows, strict=True) if len(row)] + spare
    begun[begins] = begins
    positions = torch.from_numpy(place - np.maximum.accumulate(begun))
    return replace(laid, positions=positions.view_as(laid.ids))


def _laid(rows: Sequence[Any], value: int, starts: Sequence[int], shape: tuple[int, int]) -> Laid:
    ids, mask = np.full(shape, value, np.int64), np.zeros(shape, np.int64)
    for start, row in zip(starts, rows, strict=True):
        ids.reshape(-1)[start : start + len(row)] = row
        mask.reshape(-1)[start : start + len(row)] = 1
    return Laid(torch.from_numpy(ids), torch.from_numpy(mask), torch.tensor(starts, dtype=torch.int64))
