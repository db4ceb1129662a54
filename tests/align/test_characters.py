"""Mixed scripts: places are where the tokens' bytes say, and a piece of one pivot token is as likely as the source has
it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fusechat.align.maps import prefix
from fusechat.align.projection import Ragged, gold_path, project
from fusechat.align.sequence import align_offsets
from fusechat.chats.render import PLAIN_TEMPLATE, ChatRenderer, Rendered
from fusechat.chats.vocabulary import token_bytes
from fusechat.tiny.models import make_tokenizer

PAIRS = [("a", "pivot"), ("pivot", "a"), ("torn", "c"), ("c", "torn"), ("torn", "a")]
MIXED = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SCRIPTS = [*"abe Z9é—北京の語👩👧🙂हिन्दीبκα", "tree ", "\u200d", "èक", "èख京", "èè京"]
TEXTS = st.lists(
    st.sampled_from(SCRIPTS),
    min_size=1,
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def known(tokenizers: Callable[[str], Any]) -> dict[str, Any]:
    """Bytes of GPT-2's make and SentencePiece's, and one whose tokens end and begin inside characters, as Qwen's do."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice([*"नਨન"]) + rng.choice([*"कख京"]) for _ in range(4)) for _ in range(200)]
    return {
        "torn": make_tokenizer("gpt_neox", 420, words),
        **{name: tokenizers(name) for name in ("a", "b", "c", "pivot")},
    }


def test_tokens_begin_inside_characters(known: dict[str, Any]) -> None:
    pieces = [piece for piece in token_bytes(known["torn"]) if piece and len(piece) > 1]
    assert any(0x80 <= piece[0] < 0xC0 and piece[1] >= 0xC0 for piece in pieces), "the end of one, the next begun"


def read(tokenizer: Any, text: str, max_length: int = 2048) -> Rendered:
    """A question that is not empty, then the text: something predicts its first token."""
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    return ChatRenderer(tokenizer, template=template, max_length=max_length, end_of_turn=False)([chat])[0]


@pytest.mark.parametrize("name", ["a", "b", "c", "pivot", "torn"])
@MIXED
@example("aèक èè京", 40)
@example("aèक", 6)
@given(TEXTS, st.integers(4, 40))
def test_places_are_where_the_tokens_bytes_say(known: dict[str, Any], name: str, text: str, max_length: int) -> None:
    tokenizer = known[name]
    if name == "b":
        text = text.replace("\u200d", "")  # its normaliser composes characters
    rendered, pieces = read(tokenizer, text, max_length), token_bytes(tokenizer)
    before = np.cumsum([0, *(len(pieces[i] or b"") for i in rendered.input_ids)]) - len(b"x\n")
    characters = set(np.cumsum([0, *(len(c.encode()) for c in text)]).tolist())
    for position, place in zip(rendered.positions + 1, rendered.boundaries, strict=True):
        at = max(int(before[position]), 0)
        assert place == (at if at in characters else -1)
    if rendered.truncated and before[-1] > 0:
        whole = min(int(before[-1]), len(text.encode()))
        assert rendered.end == (whole if whole in characters else -1)
        assert rendered.n_bytes == max(c for c in characters if c <= whole)
    if not rendered.truncated:
        assert (rendered.end, rendered.n_bytes) == (len(text.encode()) + 1, len(text.encode()))


@pytest.mark.parametrize("pair", PAIRS)
@MIXED
@example("aèक èè京 èख", 0)
@given(TEXTS, st.integers(0, 2**32 - 1))
def test_a_piece_of_one_pivot_token_is_as_likely_as_the_source_has_it(
    known: dict[str, Any], pair: tuple[str, str], text: str, seed: int
) -> None:
    """Between two places that both tokenizers share; 3 % is what is asked, rounding what is seen."""
    aligned, own, _ = gold_nats(known, pair, text, seed)
    assert aligned == pytest.approx(own, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("pair", PAIRS)
def test_mixed_scripts_gold_cross_entropy_is_the_sources_own(known: dict[str, Any], pair: tuple[str, str]) -> None:
    """Over a text of many scripts, where both tokenizers have a boundary at both ends: within 3 %."""
    rng = np.random.default_rng(1)
    found = [gold_nats(known, pair, "".join(rng.choice(SCRIPTS, 24)), number) for number in range(40)]
    aligned, own = (sum(values[k].sum() for values in found) for k in (0, 1))
    assert aligned == pytest.approx(own, rel=0.03)
    positions, pieces = sum(count for *_, count in found), sum(len(values) for values, *_ in found)
    assert pieces > 0.05 * positions, "of tokens that are single bytes, mostly"


def gold_nats(known: dict[str, Any], pair: tuple[str, str], text: str, seed: int) -> tuple[Any, Any, int]:
    """Of each piece that is one pivot token: what the aligned gold token costs, and what the piece cost the source,
    whose tokens are as likely as chance has it; how many tokens the text is to the pivot.
    """
    source, pivot = (known[name] for name in pair)
    theirs, own = read(pivot, text), read(source, text)
    gold, spoken = (r.input_ids[r.positions + 1] for r in (theirs, own))
    places = [np.append(r.boundaries, r.end) for r in (theirs, own)]
    match, _ = align_offsets(theirs.boundaries, own.boundaries)
    p = np.random.default_rng(seed).uniform(0.05, 0.95, len(spoken)).astype(np.float32)
    alone = Ragged(np.ones(len(spoken), np.int64), spoken, np.log(p), np.log(p))
    path = gold_path(*places, match, spoken)
    found = project(alone, match, prefix(source, pivot, []), gold, path, len(pivot), False)
    nats = np.concatenate([[0], -np.cumsum(np.log(p))])
    _, at, of_source = np.intersect1d(places[0], np.where(places[1] < 0, -2, places[1]), return_indices=True)
    alone_in_piece = np.flatnonzero(np.diff(at) == 1)
    spent = nats[of_source[alone_in_piece + 1]] - nats[of_source[alone_in_piece]]
    return -found.gold_logprob[at[alone_in_piece]], spent, len(gold)


def test_a_texts_first_token_is_predicted_by_nothing(tokenizers: Callable[[str], Any]) -> None:
    """Plain text without a beginning-of-text token; with one, all of it is predicted."""
    text = "tree water 北京"
    for name, begun in (("a", False), ("pivot", True)):
        renderer = ChatRenderer(tokenizers(name), template=PLAIN_TEMPLATE)
        rendered = renderer([[{"role": "assistant", "content": text}]])[0]
        first = 0 if begun else int(rendered.char_spans[0, 1])
        assert rendered.n_bytes == len(text[first:].encode())
        slow = renderer._without_offsets([{"role": "assistant", "content": text}], rendered.text)
        assert slow.n_bytes == rendered.n_bytes
        assert slow.boundaries[0] == rendered.boundaries[0] == first
