"""Padding: every row comes back from under its mask, on either side, and the rest is the fill value."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusechat.chats.padding import Layout, flattened, packed, pad


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[1, 2, 3], [4, 9, 9], [9, 9, 9]], [[1, 1, 1], [1, 0, 0], [0, 0, 0]]),
        ("left", [[1, 2, 3], [9, 9, 4], [9, 9, 9]], [[1, 1, 1], [0, 0, 1], [0, 0, 0]]),
    ],
)
def test_by_hand(side: Any, ids: list[list[int]], mask: list[list[int]]) -> None:
    found = pad([[1, 2, 3], np.array([4], np.uint16), []], 9, side)
    assert [t.tolist() for t in found] == [ids, mask]
    assert [t.dtype for t in found] == [torch.long, torch.long]


@given(
    st.lists(st.lists(st.integers(0, 2**31), max_size=9), min_size=1, max_size=6), st.sampled_from(["right", "left"])
)
def test_rows_come_back(rows: list[list[int]], side: Any) -> None:
    ids, mask = pad(rows, -1, side)
    assert [i[m == 1].tolist() for i, m in zip(ids, mask, strict=True)] == rows
    assert (ids[mask == 0] == -1).all()
    assert ids.shape == mask.shape == (len(rows), max(1, *(len(row) for row in rows), 1))


def test_only_empty_rows_are_one_wide() -> None:
    assert pad([[], []])[0].tolist() == [[0], [0]]


@given(st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=7), st.sampled_from([packed, flattened]))
def test_shared_rows_hold_every_chat_once(rows: list[list[int]], lay: Layout) -> None:
    """Each comes back from its start, its positions count from 0, and so do those of what is spare."""
    laid, longest = lay(rows, -1), max(1, *(len(row) for row in rows), 1)
    ids, mask, positions = laid.ids.reshape(-1), laid.mask.reshape(-1), laid.positions.reshape(-1)
    for start, row in zip(laid.starts.tolist(), rows, strict=True):
        assert ids[start : start + len(row)].tolist() == row
        assert positions[start : start + len(row)].tolist() == [*range(len(row))]
        assert len({place // laid.ids.shape[1] for place in range(start, start + len(row))}) <= 1, "in one row"
    assert int(mask.sum()) == sum(map(len, rows))
    assert (ids[mask == 0] == -1).all()
    first_spare = (mask == 0) & (torch.cat([torch.ones(1), mask[:-1]]) == 1)
    assert (positions[first_spare] == 0).all()
    assert (positions.view_as(laid.ids)[:, 0] == 0).all()
    if lay is packed:
        assert laid.ids.shape[1] == longest
        assert len(laid.ids) <= len(rows)
    else:
        assert laid.ids.shape == (1, max(1, sum(map(len, rows))))


def test_packed_by_hand() -> None:
    """The longest first, each in the first row with room."""
    laid = packed([[1, 2], [3, 4, 5, 6], [7, 8, 9], [5]], 0)
    assert laid.ids.tolist() == [[3, 4, 5, 6], [7, 8, 9, 5], [1, 2, 0, 0]]
    assert laid.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 0, 1]]
    assert laid.starts.tolist() == [8, 0, 4, 7]
