"""The preview counts what extraction and alignment then count, and colours what training then trains on."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fusechat.align.summary import numbers as aligned_numbers
from fusechat.chats.formats import load_chats
from fusechat.chats.render import Rendered, renderer_for
from fusechat.extract.summary import totals
from fusechat.preview import colours
from fusechat.preview.reading import LOST, Reading, lost, meeting, read, shares
from fusechat.stores.kinds import NONE
from fusechat.stores.store import DistributionStore
from tests.conftest import Mini


@pytest.fixture(scope="module")
def readings(mini: Mini, tokenizers: Any) -> dict[str, Reading]:
    chats, _ = load_chats(mini.experiment / "world/chats/fusion.jsonl")
    messages, pivot = [row["messages"] for row in chats], tokenizers("pivot")
    chat = mini.cfg("extract").chat
    return {
        name: read(name, renderer_for(tokenizers(name), pivot, chat.template, chat.max_length), messages)
        for name in ("pivot", "a")
    }


@pytest.mark.parametrize("name", ["pivot", "a"])
def test_it_counts_what_extraction_counts(mini: Mini, readings: dict[str, Reading], name: str) -> None:
    stored = totals(DistributionStore(mini.experiment / "distributions" / name).manifest)
    found = readings[name].numbers()
    assert found["tokens"] == stored["tokens"] > 0
    assert sum(len(chat.positions) for chat in readings[name].rendered) == stored["positions"]
    assert found["cut"] * found["chats"] == stored["truncated"]
    assert found["without_answer"] * found["chats"] == len(stored["no_response"])


def test_it_counts_what_alignment_counts(mini: Mini, readings: dict[str, Reading]) -> None:
    stored = aligned_numbers(DistributionStore(mini.experiment / "aligned/a").manifest)
    found = shares(meeting(readings["pivot"], readings["a"], mini.cfg("align").alignment.sequence))
    assert found == {kind: pytest.approx(stored[kind]) for kind in found}
    assert 0 < found["same"] < 1
    by_text = shares(meeting(readings["pivot"], readings["a"], "dtw"))
    assert sum(by_text.values()) == pytest.approx(1)


def test_what_is_lost_is_told_by_kind(readings: dict[str, Reading]) -> None:
    pivot, source = readings["pivot"], readings["a"]
    kinds = meeting(pivot, source, "offsets")
    found = lost(pivot, source, kinds)
    assert sum(found.values()) == pytest.approx(shares(kinds)["none"])
    assert found["inside a word"] > 0
    assert sum(lost(pivot, source, meeting(pivot, source, "chain")).values()) < found["inside a word"]


def test_kinds_of_what_is_lost_by_hand() -> None:
    """One chat whose every position is lost; the source has ``under``, ``-->`` and the end as one token each."""
    texts = ["x", "un", "der", "--", ">", "  ", "42", "🙂", "</s>"]
    ends = np.cumsum([len(text) for text in texts])
    spans = np.stack([ends - [len(text) for text in texts], ends], 1)
    positions = np.arange(len(texts) - 1)
    before = np.cumsum([0, *(len(text.encode()) for text in texts[1:])])
    end = int(before[-1])
    bounds = np.where(np.array(texts[1:]) == "🙂", -1, before[:-1])
    ids, none = np.arange(len(texts)), np.full(len(positions), NONE, np.uint8)
    special = {8: SimpleNamespace(special=True), 3: SimpleNamespace(special=False)}
    tokenizer = SimpleNamespace(added_tokens_decoder=special)
    chat = Rendered("".join(texts), ids, spans, ids > 0, positions, bounds, end, end, "", False)
    own = Rendered("", ids, spans, ids > 0, positions[:3], np.array([0, 5, 8]), end, end, "", False)
    found = lost(Reading("p", tokenizer, [chat]), Reading("s", tokenizer, [own]), [none])
    wanted = {
        "inside a word": 1,
        "inside signs": 1,
        "white space": 1,
        "digits": 1,
        "inside a character": 1,
        "template": 1,
    }
    assert found == {name: wanted.get(name, 2) / 8 for name in LOST}, "the first halves have a place of the source's"


def test_colours_are_the_masks(readings: dict[str, Reading]) -> None:
    reading = readings["pivot"]
    for chat in reading.rendered[:8]:
        text = colours.trained(chat)
        assert text.plain == chat.text
        green = "".join(text.plain[s.start : s.end] for s in text.spans if str(s.style) in colours.TRAINED)
        tokens = np.flatnonzero(chat.assistant_mask)
        assert green == "".join(chat.text[first:end] for first, end in chat.char_spans[tokens])


def test_what_is_cut_is_struck_out(mini: Mini, tokenizers: Any) -> None:
    chats, _ = load_chats(mini.experiment / "world/chats/fusion.jsonl")
    pivot = tokenizers("pivot")
    (chat,) = read("pivot", renderer_for(pivot, pivot, "pivot", 12), [chats[0]["messages"]]).rendered
    text = colours.trained(chat)
    struck = [text.plain[s.start : s.end] for s in text.spans if str(s.style) == colours.CUT]
    assert struck == [chat.text[chat.char_spans[-1, 1] :]]


def test_the_command_prints_and_writes_the_page(mini: Mini, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "folder/preview.html"
    for _ in range(2):  # a page of its own is replaced
        mini.run("preview", "source=a", "preview.show=1", "preview.count=20", f"output_file={page}")
    printed = capsys.readouterr().out
    assert "chat 0, where a speaks for the pivot's tokens" in printed
    assert re.search(r"│ chats +│ +20 │ +20 │", printed)
    html = page.read_text()
    assert "chat 0, as a reads it" in html
    assert "background-color" in html
    assert not re.search(r"https?://", html), "asks no other host"


@pytest.mark.parametrize("source", ["default", "own"])
def test_without_a_source_it_shows_the_pivot_alone(source: str, mini: Mini, capsys: pytest.CaptureFixture[str]) -> None:
    mini.run("preview", f"source={source}", "preview.show=0")
    printed = capsys.readouterr().out
    assert "chats as read by" in printed
    assert "partners by" not in printed
