"""Vocabulary maps: the golden MinED maps, and properties of the others on the miniature world's four tokenizers."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusechat.align import maps
from fusechat.align.nearest import nearest
from fusechat.chats import vocabulary
from tests.align.test_sequence import levenshtein
from tests.conftest import GOLDEN

PAIRS = [("a", "pivot"), ("b", "pivot"), ("c", "pivot"), ("pivot", "a")]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text("ab▁é", min_size=1, max_size=5), min_size=1, max_size=6),
    st.lists(st.text("abc▁é", min_size=1, max_size=5), min_size=1, max_size=9),
)
def test_nearest_is_the_smallest_distance_with_the_lowest_id(names: list[str], candidates: list[str]) -> None:
    found, distance = nearest(names, candidates)
    for name, index, d in zip(names, found, distance, strict=True):
        distances = [levenshtein(name, candidate) for candidate in candidates]
        assert d == min(distances)
        assert index == distances.index(min(distances))


def test_nearest_handles_names_longer_than_a_machine_word() -> None:
    found, distance = nearest(["x" * 80], ["y", "x" * 78, "x" * 82])
    assert (found.tolist(), distance.tolist()) == ([1], [2])


@pytest.mark.parametrize("name", ["mistral-v1__llama3", "qwen__deepseek"])
def test_golden_maps_are_within_the_published_distance(name: str) -> None:
    """The full vocabularies are not here; among the golden pivot tokens the map must be found again exactly."""
    golden, content = (
        np.load(GOLDEN / "align" / f"maps_{name}.npz"),
        json.loads((GOLDEN / "align" / f"{name}.json").read_text()),
    )
    pairs = content["pairs"].values() if isinstance(content["pairs"], dict) else content["pairs"]
    pivot = {i: t for p in pairs for i, t in zip(p["pivot_ids"], p["pivot_tokens"], strict=True)}
    source = {i: t for p in pairs for i, t in zip(p["source_ids"], p["source_tokens"], strict=True)}
    ids = sorted(pivot)
    names = {
        i: source[i].replace(content["source_marker"], content["pivot_marker"])
        for i in golden["source_id"]
        if i in source
    }
    found, distance = nearest(list(names.values()), [pivot[i] for i in ids])
    answers = dict(
        zip(golden["source_id"], zip(golden["mined_pivot_id"], golden["mined_distance"], strict=True), strict=True)
    )
    known = 0
    for (source_id, _), index, d in zip(names.items(), found, distance, strict=True):
        wanted, best = answers[source_id]
        assert d >= best
        if wanted in pivot:
            known += 1
            assert (ids[index], d) == (wanted, best)
    assert known > 100


@pytest.mark.parametrize(("source", "pivot"), PAIRS)
def test_em_maps_equal_bytes(source: str, pivot: str, tokenizers: Callable[[str], Any]) -> None:
    own, theirs = tokenizers(source), tokenizers(pivot)
    table = maps.em(own, theirs, [(own.eos_token_id, theirs.eos_token_id)])
    own_bytes, their_bytes = vocabulary.token_bytes(own), vocabulary.token_bytes(theirs)
    assert table[own.eos_token_id] == theirs.eos_token_id
    for index, target in enumerate(table):
        if target >= 0 and index != own.eos_token_id:
            assert own_bytes[index] == their_bytes[target]
        elif own_bytes[index]:
            assert own_bytes[index] not in their_bytes


@pytest.mark.parametrize("name", ["em", "prefix"])
def test_a_character_is_mapped_to_the_token_that_the_pivot_writes(name: str, tokenizers: Callable[[str], Any]) -> None:
    """Not to its byte's token, which a vocabulary with bytes as a last resort has beside it and never uses."""
    own, theirs = tokenizers("a"), tokenizers("pivot")
    table = getattr(maps, name)(own, theirs, [])
    for character in ".2":
        (index,), (wanted,) = (t(character, add_special_tokens=False)["input_ids"] for t in (own, theirs))
        assert (table[index], theirs.convert_ids_to_tokens(wanted)) == (wanted, character)
        assert theirs.convert_tokens_to_ids(f"<0x{ord(character):02X}>") not in (theirs.unk_token_id, wanted)


@pytest.mark.parametrize(("source", "pivot"), PAIRS)
def test_prefix_maps_to_a_beginning_of_the_token(source: str, pivot: str, tokenizers: Callable[[str], Any]) -> None:
    own, theirs = tokenizers(source), tokenizers(pivot)
    table = maps.prefix(own, theirs, [])
    own_bytes, their_bytes = vocabulary.token_bytes(own), vocabulary.token_bytes(theirs)
    mapped = [(own_bytes[i], their_bytes[t]) for i, t in enumerate(table) if t >= 0 and own_bytes[i]]
    assert len(mapped) > 0.9 * sum(b is not None and len(b) > 0 for b in own_bytes)
    assert all(text.startswith(piece) for text, piece in mapped)


@pytest.mark.parametrize("name", ["pivot", "a", "b", "c"])
def test_token_bytes_spell_the_text(name: str, tokenizers: Callable[[str], Any]) -> None:
    text = "Sort the letters d c a. What is 415?"
    tokenizer = tokenizers(name)
    pieces = [vocabulary.token_bytes(tokenizer)[i] for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert b"".join(p or b"" for p in pieces).decode().strip() == text


def test_most_supported_prefers_more_evidence() -> None:
    seen = maps.PairCounts(np.array([3, 3, 3, 4]), np.array([7, 2, 5, 1]), np.array([2, 9, 9, 1]))
    table = maps.most_supported(seen, np.array([0, 0, 6, 6, 6]))
    assert table.tolist() == [0, 0, 6, 2, 1]


def test_marker(tokenizers: Callable[[str], Any]) -> None:
    assert {name: vocabulary.marker(tokenizers(name)) for name in ("pivot", "a")} == {"pivot": "▁", "a": "Ġ"}
