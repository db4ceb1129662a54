"""The chain rule against all tokenizations that are stored, one by one; mass, telescoping, places inside characters."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusechat.align import chain, paths
from fusechat.align.paths import Lexicon
from fusechat.align.projection import Ragged
from fusechat.align.sequence import align_chain
from fusechat.align.trie import texts, trie, walk
from fusechat.stores.kinds import INSIDE, NONE
from tests.align.chains import World, tree


@pytest.mark.parametrize("kept", [None, 4])
def test_equals_the_marginal_over_all_stored_tokenizations(kept: int | None) -> None:
    """Total variation distance at every position of 40 worlds: 409 positions, 91 of them inside a source token."""
    distances, inside = [], 0
    for seed in range(40):
        world = World(seed, kept)
        result, kind = world.followed()
        starts = result.starts
        inside += int((kind == INSIDE).sum())
        assert not (kind == NONE).any()
        for i in range(len(kind)):
            part = slice(starts[i], starts[i + 1])
            found = dict(zip(result.ids[part].tolist(), np.exp(result.logprobs[part]).tolist(), strict=True))
            wanted = world.marginal(i)
            assert sum(found.values()) <= 1 + 1e-5
            distances.append(sum(abs(found.get(v, 0) - wanted.get(v, 0)) for v in {*found, *wanted}) / 2)
    assert len(distances) >= 200 and inside >= 50
    assert max(distances) < 1e-5


@pytest.mark.parametrize("kept", [None, 3])
def test_the_text_between_two_shared_places_is_as_likely_as_the_source_had_it(kept: int | None) -> None:
    """Or likelier, for other tokens of the source may spell it too; and never by the label alone."""
    likelier = 0
    for seed in range(40):
        world = World(seed, kept)
        result, _ = world.followed()
        pivot, source = (world.paths[name].places for name in ("pivot", "source"))
        _, ours, own = np.intersect1d(pivot, source, return_indices=True)
        gold, theirs = (
            np.append(0, np.cumsum(x.astype(float))) for x in (result.gold_logprob, world.ragged.gold_logprob)
        )
        gain = np.diff(gold[ours]) - np.diff(theirs[own])
        assert (gain > -1e-5).all()
        likelier += int((gain > 0.01).sum())
        assert (result.gold_logprob <= 1e-6).all()
    assert likelier > 20


def chat(
    pivot: list[bytes], source: list[bytes], entries: list[dict[int, float]], gold: list[float], **more: Any
) -> Ragged:
    """Tokens 0, 1, 2, … of either side spell the text; further texts in ``more`` are in the vocabulary and not in it."""
    own, others = source + more.get("words", []), pivot + more.get("pivot_words", [])
    sides = []
    for tokens, vocabulary in ((pivot, others), (source, own)):
        places = np.cumsum([0, *map(len, tokens)])
        places[more.get("hidden", [])] = -1
        sides.append(paths.path(np.arange(len(tokens)), places - more.get("lead", 0) * (places > 0), texts(vocabulary)))
    words = Lexicon(texts(own), tree(own), texts(others), tree(others))
    begins = [[v for v in range(len(others)) if token.startswith(others[v])] for token in own]
    table = np.array([max(found, key=lambda v: len(others[v]), default=-1) for found in begins])
    stored = Ragged(
        np.array([len(e) for e in entries]),
        np.array([u for e in entries for u in e]),
        np.log([p for e in entries for p in e.values()]).astype(np.float32),
        np.log(gold).astype(np.float32),
    )
    match, kind = align_chain(sides[0].places, sides[1].places)
    match[(kind == INSIDE) & ~paths.cut(match, *sides, words.texts)] = -1
    return chain.follow(stored, match, *sides, table, words, len(others), False, more.get("drawn", False))


def rows(result: Ragged) -> list[dict[int, float]]:
    pairs = [*zip(result.ids.tolist(), np.exp(result.logprobs).round(4).tolist(), strict=True)]
    return [dict(pairs[a:b]) for a, b in zip(result.starts, result.starts[1:], strict=False)]


def test_by_hand_inside_a_token() -> None:
    """'under' of the source is the pivot's 'un', 'der': behind 'un' what begins with it counts, at its share; 'un'
    itself says nothing more.
    """
    entries = [{0: 0.5, 1: 0.2, 2: 0.1, 3: 0.15}]
    words, more = [b"unhappy", b"un", b"other"], [b"happy", b"other"]
    found = rows(chat([b"un", b"der"], [b"under"], entries, [0.5], words=words, pivot_words=more))
    assert found[0] == pytest.approx({0: 0.8, 3: 0.15}, abs=1e-4)
    assert found[1] == pytest.approx({1: 0.5 / 0.8, 2: 0.2 / 0.8}, abs=1e-4)


def test_by_hand_along_the_path() -> None:
    """The pivot's 'under' and 'until' are the source's 'un' with 'der' or 'til': each gets its part of 'un'."""
    entries = [{0: 0.6, 3: 0.4}, {1: 0.7, 2: 0.3}]
    result = chat(
        [b"under"], [b"un", b"der"], entries, [0.6, 0.7], words=[b"til", b"other"], pivot_words=[b"until", b"other"]
    )
    assert rows(result)[0] == pytest.approx({0: 0.42, 1: 0.18, 2: 0.4}, abs=1e-4)
    assert result.gold_logprob[0] == pytest.approx(np.log(0.42), abs=1e-3)


def test_what_the_source_does_not_know_does_not_become_certain() -> None:
    """A gold token in the tail: behind its beginning the tail's other words with this beginning stand against it."""
    words = [b"other", *(b"xy" + bytes([c]) for c in b"abcdefghi")]
    result = chat([b"x", b"yz"], [b"xyz"], [{1: 0.9}], [0.01], words=words, pivot_words=[b"other", b"y"])
    assert np.exp(result.gold_logprob[1]) == pytest.approx(0.01 / (0.01 + 0.09), abs=1e-3)
    assert np.exp(result.gold_logprob.sum()) == pytest.approx(0.01, abs=1e-4)


def test_places_inside_a_character_are_reckoned_by_bytes() -> None:
    smile = "🙂".encode()
    pivot, source = [smile[:1], smile[1:], b"."], [smile[:3], smile[3:], b"."]
    of = texts(pivot)
    assert paths.path(np.arange(3), np.array([0, -1, 4, 5]), of).places.tolist() == [0, 1, 4, 5]
    assert paths.path(np.arange(3), np.array([0, -1, 3, 4]), of).places.tolist() == [0, -1, 3, 4], (
        "bytes that do not add up"
    )
    assert paths.path(np.arange(3), np.array([0, -1, 4, -1]), of).places.tolist() == [0, 1, 4, -1]
    result = chat(pivot, source, [{0: 0.8}, {1: 0.9}, {2: 0.5}], [0.8, 0.9, 0.5], hidden=[1])
    assert np.exp(result.gold_logprob) == pytest.approx([0.8, 0.9, 0.5], abs=1e-3)


def test_a_space_that_the_chat_has_not_counts_for_nothing() -> None:
    """SentencePiece puts one before a text: ' Hello' of the pivot is the source's 'Hello'."""
    pivot, own = [b" He", b"llo"], [b"Hello"]
    words = Lexicon(texts([*own, b"Hey"]), tree([*own, b"Hey"]), texts([*pivot, b" Hey"]), tree([*pivot, b" Hey"]))
    sides = (
        paths.path(np.arange(2), np.array([0, 2, 5]), words.pivot_texts),
        paths.path(np.arange(1), np.array([0, 5]), words.texts),
    )
    assert [side.lead.tolist() for side in sides] == [[1, 0], [0]]
    match, _ = align_chain(sides[0].places, sides[1].places)
    stored = Ragged(
        np.array([2]), np.array([0, 1]), np.log([0.6, 0.4]).astype(np.float32), np.log([0.6]).astype(np.float32)
    )
    found = rows(chain.follow(stored, match, *sides, np.array([-1, -1]), words, 3, False))
    assert found[0] == pytest.approx({0: 0.6, 2: 0.4}, abs=1e-4)
    assert found[1] == pytest.approx({1: 1.0}, abs=1e-4)


def test_samples_are_unbiased_where_the_source_begins_a_token() -> None:
    """The mean over draws of the shares is the distribution, along the path too; no draw makes mass."""
    rng, p = np.random.default_rng(0), (np.array([0.6, 0.4]), np.array([0.7, 0.3]))
    sums, copies = np.zeros(3), 3000
    for _ in range(copies):
        shares = [
            {u + 2 * (u == 1 and j == 0) + (j == 1): c / 4 for u, c in enumerate(rng.multinomial(4, p[j])) if c}
            for j in (0, 1)
        ]
        words = {"words": [b"til", b"other"], "pivot_words": [b"until", b"other"], "drawn": True}
        found = rows(chat([b"under"], [b"un", b"der"], shares, [0.6, 0.7], **words))[0]
        assert sum(found.values()) <= 1 + 1e-3
        sums[list(found)] += list(found.values())
    assert sums / copies == pytest.approx([0.42, 0.18, 0.4], abs=0.02)


@settings(max_examples=60)
@given(st.sets(st.binary(min_size=1, max_size=4), min_size=1, max_size=30), st.binary(max_size=5))
def test_a_tree_knows_beginnings(words: set[bytes], text: bytes) -> None:
    ids = {word: 7 * i for i, word in enumerate(sorted(words))}
    made = trie(ids)
    node, token, size = walk(made, 0, np.frombuffer(text, np.uint8))
    longest = max((word for word in words if text.startswith(word)), key=len, default=None)
    assert (token, size) == ((-1, 0) if longest is None else (ids[longest], len(longest)))
    below = sum(word.startswith(text) for word in words)
    assert (made.below[node] if node >= 0 else 0) == below
    assert made.below[0] == len(words)
