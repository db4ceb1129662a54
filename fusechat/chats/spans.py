"""Where what is said lies in a rendered chat: found between what the template prints around sentinels in its place.

A thought is what a content has between <think> and </think>. Templates of models that think take it out of the content,
keep that of the last answer and drop the others: what is kept is the assistant's text, tags and all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from fusechat.chats.roles import Message

Spans = list[tuple[int, int, int]]  # message, first character, end
SENTINEL = re.compile("\ue000(\\d+)\ue001")
OPEN, CLOSE = "<think>", "</think>"


def marked(chat: Sequence[Message], roles: Sequence[str]) -> list[Message]:
    """The chat with sentinels as contents of ``roles``: each holds its message's number."""
    return [
        {**message, "content": _sentinel(i)} if message["role"] in roles else message for i, message in enumerate(chat)
    ]


def is_thought(message: Message) -> bool:
    """Whether a message holds a thought."""
    return message["role"] == "assistant" and CLOSE in message["content"]


def in_parts(chat: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The chat with answers alone, behind it its thoughts; and the same chat with sentinels for each of them.

    The thought of message i is number len(chat) + i. An empty one has none: what is printed of it is the template's.
    """
    parted, marks, thoughts = list[Message](), list[Message](), list[Message]()
    for i, message in enumerate(chat):
        thought, answer = _parts(message) if is_thought(message) else ("", message["content"])
        parted.append({**message, "content": answer})
        thoughts.append({**message, "content": thought})
        inner = _sentinel(len(chat) + i) if thought else ""
        before = f"{OPEN}\n{inner}\n{CLOSE}\n\n" if is_thought(message) else ""
        marks.append({**message, "content": before + _sentinel(i)})
    return [*parted, *thoughts], marks


def with_thoughts(chat: Sequence[Message], text: str, spans: Spans) -> Spans:
    """Spans of answers that begin where their thoughts do, where these are printed. spans: of the parts too."""
    whole: Spans = []
    for index, first, end in (span for span in spans if span[0] < len(chat)):
        at = text.rfind(OPEN, 0, first)
        if at >= 0 and is_thought(chat[index]) and (thought := _parts(chat[index])[0].strip()):
            inner, _, between = text[at + len(OPEN) : first].partition(CLOSE)
            first = at if inner.strip() == thought and not between.strip() else first
        whole.append((index, first, end))
    return whole


def _parts(message: Message) -> tuple[str, str]:
    """The thought and the answer of a content that has both."""
    thought, _, answer = message["content"].rpartition(CLOSE)
    return thought.rpartition(OPEN)[2].strip("\n"), answer.lstrip("\n")


def _sentinel(number: int) -> str:
    return f"\ue000{number}\ue001"


def found(chat: Sequence[Message], text: str, pieces: list[tuple[str, int]]) -> tuple[Spans, int | None]:
    """Where the contents between the pieces lie in a text, and the first message that is not where it should be."""
    spans: Spans = []
    at = 0
    for (literal, index), (following, _) in pairwise(pieces):
        start, last = at + len(literal), len(spans) + 2 == len(pieces)
        end = _content_end(text, start, chat[index]["content"], following, last)
        if not text.startswith(literal, at) or end is None:
            return spans, index
        spans.append((index, start, end))
        at = end
    return spans, None


def _content_end(text: str, start: int, content: str, following: str, last: bool) -> int | None:
    """Where the content that starts at ``start`` ends: it is printed as it is or stripped, or cut down by the template.

    following: the literal after it; last: the text must end with that.
    """

    def fits(end: int) -> bool:
        return text.startswith(following, end) and (not last or end + len(following) == len(text))

    for kept in (content, content.strip(), content.rstrip(), content.lstrip()):
        if text.startswith(kept, start) and fits(start + len(kept)):
            return start + len(kept)
    end = text.find(following, start) if following else len(text)
    return end if end >= 0 and text[start:end] in content and fits(end) else None
