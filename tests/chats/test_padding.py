"""Padding: every row comes back from under its mask, on either side, and the rest is the fill value."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusechat.chats.padding import pad


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
