"""Whether the questions of a test set occur among the chats that models learn from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from fusechat.chats.roles import Message

Question = tuple[str, ...]  # what the user has said up to an answer


def shared_questions(chats: Iterable[Sequence[Message]], tests: Iterable[Sequence[Message]]) -> int:
    """How many tests ask what a chat asks too: the user's turns up to the last, white space and case apart."""
    asked = {question for chat in chats for question in questions(chat)}
    return sum(bool(last) and last[-1] in asked for last in (list(questions(test)) for test in tests))


def questions(chat: Sequence[Message]) -> Iterator[Question]:
    """What the user has said up to each answer, white space and case apart."""
    said: Question = ()
    for turn in chat:
        if turn["role"] == "user":
            said = (*said, " ".join(turn["content"].split()).casefold())
            yield said
