"""DTW against the released code's outputs and a naive reference; offsets against a set of boundaries."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusechat.align.sequence import align_dtw, align_offsets, dtw
from fusechat.stores.kinds import MANY_TO_ONE, NONE, ONE_TO_MANY, SAME
from tests.conftest import GOLDEN

TOKENS = st.lists(st.text("abé ", min_size=0, max_size=4), min_size=1, max_size=12)


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def naive_dtw(pivot: list[str], source: list[str]) -> list[list[int]]:
    """The published procedure, as slowly as it is told."""
    n, m = len(pivot), len(source)
    total = [[0.0] * m for _ in range(n)]
    at = lambda i, j: total[i][j] if i >= 0 and j >= 0 else float("inf")
    for i in range(n):
        for j in range(m):
            best = 0.0 if i == j == 0 else min(at(i - 1, j), at(i, j - 1), at(i - 1, j - 1))
            total[i][j] = levenshtein(pivot[i], source[j]) + best
    i, j, mapping = n - 1, m - 1, [[] for _ in pivot]
    while True:
        mapping[i].insert(0, j)
        if i == j == 0:
            return mapping
        options = [at(i - 1, j - 1), at(i, j - 1), at(i - 1, j)]
        move = options.index(min(options))
        i, j = i - (move in (0, 2)), j - (move in (0, 1))


@pytest.mark.parametrize("name", ["mistral-v1__llama3", "qwen__deepseek"])
def test_dtw_equals_the_released_code(name: str) -> None:
    content = json.loads((GOLDEN / "align" / f"{name}.json").read_text())
    pairs = content["pairs"].values() if isinstance(content["pairs"], dict) else content["pairs"]
    for pair in pairs:
        first, last = dtw(pair["pivot_decoded"], pair["source_decoded"])
        assert [list(range(a, b + 1)) for a, b in zip(first, last, strict=True)] == pair["base_to_blending"]


@settings(deadline=None, max_examples=150)
@given(TOKENS, TOKENS)
def test_dtw_equals_the_naive_reference(pivot: list[str], source: list[str]) -> None:
    first, last = dtw(pivot, source)
    assert [list(range(a, b + 1)) for a, b in zip(first, last, strict=True)] == naive_dtw(pivot, source)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=15), st.lists(st.integers(1, 4), min_size=1, max_size=15))
def test_offsets_match_equal_boundaries(pivot_steps: list[int], source_steps: list[int]) -> None:
    pivot, source = (np.cumsum([0, *steps]) for steps in (pivot_steps, source_steps))
    match, kind = align_offsets(pivot, source)
    for i, j in enumerate(match):
        assert (j >= 0) == (pivot[i] in source) == (kind[i] != NONE)
        if j >= 0:
            assert source[j] == pivot[i]


def test_kinds_by_hand() -> None:
    match, kind = align_offsets(np.array([0, 3, 6, 8, 10]), np.array([0, 3, 4, 6, 10]))
    assert match.tolist() == [0, 1, 3, -1, 4]
    assert kind.tolist() == [SAME, SAME, MANY_TO_ONE, NONE, ONE_TO_MANY]


def test_positions_inside_a_character_have_no_partner() -> None:
    match, _ = align_offsets(np.array([0, -1, -1, 1]), np.array([0, -1, 1]))
    assert match.tolist() == [0, -1, -1, 2]


def test_align_dtw_takes_the_last_of_a_span() -> None:
    match, kind = align_dtw(["ab", "cd", "</s>"], ["a", "b", "cd", "<e>"])
    assert match.tolist() == [0, 2, 3]
    assert kind.tolist() == [SAME, MANY_TO_ONE, SAME]
    match, kind = align_dtw(["a", "b", "cd", "</s>"], ["ab", "cd", "<e>"])
    assert match.tolist() == [0, -1, 1, 2]
    assert kind.tolist() == [SAME, NONE, ONE_TO_MANY, SAME]


def test_empty_responses_align_with_nothing() -> None:
    assert align_dtw([], ["a"])[0].tolist() == []
    assert align_dtw(["a"], [])[0].tolist() == [-1]
    assert align_offsets(np.array([], np.int64), np.array([0]))[0].tolist() == []
