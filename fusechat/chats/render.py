"""Chats: from files in the formats people have, through the tokenizer's own chat template, to token ids with masks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from fusechat.app.errors import UserError
from fusechat.chats import slow_tokenizers
from fusechat.chats.roles import Message, in_two_roles
from fusechat.chats.spans import SENTINEL, Spans, found, in_parts, is_thought, marked, with_thoughts
from fusechat.chats.turns import Turns

LOG = logging.getLogger(__name__)
Ints = npt.NDArray[np.int64]
PLAIN_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}{{ eos_token }}"


@dataclass(frozen=True)
class Rendered:
    """One chat as a model reads it. T tokens, R response positions.

    input_ids [T]; char_spans [T, 2], where each token lies in ``text``; assistant_mask [T], the tokens to train on.
    positions [R]: every t whose *next* token is the assistant's. boundaries [R]: how many UTF-8 bytes of assistant
    text lie before that next token (turns are one byte apart), or -1 inside a character: the coordinate on which two
    tokenizations of the same chat meet. end: the same behind the last token, -1 where the cut is inside a character.
    n_bytes: bytes of the characters that are predicted: not of a text's first token, nor of a character that is cut.
    text_hash: of all of the assistant's text.
    """

    text: str
    input_ids: Ints
    char_spans: Ints
    assistant_mask: npt.NDArray[np.bool_]
    positions: Ints
    boundaries: Ints
    end: int
    n_bytes: int
    text_hash: str
    truncated: bool


class ChatRenderer:
    """Renders chats with a chat template and finds the assistant's text in the result, for any template.

    template: ``native`` (this tokenizer's own), or a Jinja text. ``host`` is the tokenizer whose special tokens
    the template names (the pivot, when every source reads the pivot's format). end_of_turn: train on the special
    token that closes an assistant's turn. train_on: ``all`` turns of the assistant, or the ``last``. A slow tokenizer
    knows no boundaries inside a turn (`slow_tokenizers`). A chat with roles that the template refuses is read with user
    and assistant alone (`roles.in_two_roles`). Raises `UserError` for a missing template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str = "native",
        host: Any = None,
        max_length: int = 2048,
        end_of_turn: bool = True,
        train_on: str = "all",
    ) -> None:
        self.tokenizer, self.host = tokenizer, host or tokenizer
        self.template = self.host.chat_template if template == "native" else template
        if not self.template:
            raise UserError(
                f"the tokenizer {self.host.name_or_path!r} has no chat template; give one with "
                "chat.template='<jinja>', chat.template=pivot or chat.template=plain"
            )
        self.max_length, self.end_of_turn, self.train_on = max_length, end_of_turn, train_on
        self._pieces: dict[tuple[str, ...], list[tuple[str, int]]] = {}
        self._refused: set[tuple[str, ...]] = set()
        self._untold: set[str] = set()  # roles whose turns are left out

    def __call__(self, chats: Sequence[Sequence[Message]]) -> list[Rendered]:
        """Renders and tokenizes a batch of chats."""
        chats = [self._accepted(chat) for chat in chats]
        texts = self._apply(chats)
        if not self.tokenizer.is_fast:
            return [self._without_offsets(*pair) for pair in zip(chats, texts, strict=True)]
        encodings = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False).encodings
        return [self._with_offsets(*three) for three in zip(chats, texts, encodings, strict=True)]

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that asks the model for its next answer."""
        try:
            return str(self._call([dict(m) for m in messages], add_generation_prompt=True))
        except UserError:
            if (others := in_two_roles(messages)) == [*messages]:
                raise
            return str(self._call(others, add_generation_prompt=True))

    def content_spans(self, chat: Sequence[Message], text: str) -> Spans:
        """(message index, first character, end) of every message's content in the rendered text.

        The template is rendered once per sequence of roles with sentinels as contents; what lies between them is
        literal and is found again in ``text``, with the content in between, as it is or stripped by the template.
        Where a thought decides more of the text than that (templates of models that think keep those of the last
        answer), thought and answer are found each for itself. Where what others say does (quoted as JSON, left out
        where it is empty), the chat is rendered with sentinels for the assistant's contents alone, and these are found.
        Raises `UserError` where a template rewrites one of them beyond recognition.
        """
        spans, lost = found(chat, text, self._literals(chat))
        if lost is not None and any(is_thought(message) for message in chat):
            parted, marks = in_parts(chat)
            spans, lost = found(parted, text, self._split(marks))
            spans = with_thoughts(chat, text, spans)
        if lost is not None:
            spans, lost = found(chat, text, self._split(marked(chat, ("assistant",))))
        if lost is not None:
            raise UserError(
                f"the chat template rewrites message {lost} ({chat[lost]['role']}: {chat[lost]['content'][:40]!r}) so "
                "that it is not found in the rendered text; give another with chat.template='<jinja>'"
            )
        return spans

    def _with_offsets(self, chat: Sequence[Message], text: str, encoding: Any) -> Rendered:
        ids = np.array(encoding.ids, np.int64)
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(ids)).reshape(-1, 2)
        truncated, kept = len(ids) > self.max_length, slice(self.max_length)
        torn = truncated and bool(offsets[self.max_length, 0] < offsets[kept, 1].max())  # the cut is in a character
        return self._rendered(chat, text, self.content_spans(chat, text), ids[kept], offsets[kept], truncated, torn)

    def _without_offsets(self, chat: Sequence[Message], text: str) -> Rendered:
        spans = self.content_spans(chat, text)
        return self._rendered(chat, text, spans, *slow_tokenizers.encode(self.tokenizer, text, spans, self.max_length))

    def _rendered(
        self,
        chat: Sequence[Message],
        text: str,
        spans: Spans,
        ids: Ints,
        offsets: Ints,
        truncated: bool,
        torn: bool = False,
    ) -> Rendered:
        """Marks the tokens that hold an assistant's text, turn by turn."""
        turns, contents = Turns(text, offsets, torn), hashlib.sha256()
        spoken = [(first, end) for index, first, end in spans if chat[index]["role"] == "assistant"]
        for first, end in spoken[-1:] if self.train_on == "last" else spoken:
            contents.update(text[first:end].encode())
            close = self._closing(ids, offsets, text, turns.after(end), end) if self.end_of_turn else None
            turns.add(first, end, close)
        positions = np.flatnonzero(turns.mask[1:])
        boundaries = np.where(turns.inside[positions + 1], -1, turns.before[positions + 1])
        last = (-1 if torn else turns.reached) if truncated else turns.total
        found = positions, boundaries, last, turns.n_bytes, contents.hexdigest()[:8], truncated
        return Rendered(text, ids, offsets, turns.mask, *found)

    def _closing(self, ids: Ints, offsets: Ints, text: str, at: int, end: int) -> int | None:
        """Index of the special token that closes the turn: the first one after the content, white space allowed."""
        while at < len(ids) and int(ids[at]) not in self._special_ids:
            if text[end : offsets[at, 1]].strip():
                return None
            at += 1
        return at if at < len(ids) and not text[end : offsets[at, 0]].strip() else None

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special)

    def _accepted(self, chat: Sequence[Message]) -> Sequence[Message]:
        """The chat, or the same in two roles where the template refuses its own."""
        roles = tuple(message["role"] for message in chat)
        if roles not in self._pieces and roles not in self._refused:
            try:
                self._literals(chat)
            except UserError:
                if in_two_roles(chat) == [*chat]:
                    raise
                self._refused.add(roles)
        return in_two_roles(chat) if roles in self._refused else chat

    def _literals(self, chat: Sequence[Message]) -> list[tuple[str, int]]:
        roles = tuple(message["role"] for message in chat)
        if roles not in self._pieces:
            pieces = self._split(marked(chat, roles))
            if lost := {*roles} - {roles[index] for _, index in pieces[:-1]} - self._untold:
                told = "the chat template of %r prints no turn of %s: what it says is read by no model"
                LOG.warning(told, self.host.name_or_path, ", ".join(sorted(lost)))
                self._untold |= lost
            self._pieces[roles] = pieces
        return self._pieces[roles]

    def _split(self, chat: Sequence[Message]) -> list[tuple[str, int]]:
        """What the template prints around the sentinels of a chat: each with the number behind it, -1 at the end."""
        parts = SENTINEL.split(self._apply([chat])[0])
        indices = [int(part) for part in parts[1::2]]
        if len(set(indices)) != len(indices):
            raise UserError("the chat template prints a message twice; give another with chat.template='<jinja>'")
        return [*zip(parts[::2], [*indices, -1], strict=True)]

    def _apply(self, chats: Sequence[Sequence[Message]]) -> list[str]:
        return list(self._call([[dict(message) for message in chat] for chat in chats]))

    def _call(self, conversation: list[Any], **options: Any) -> Any:
        try:
            return self.host.apply_chat_template(conversation, tokenize=False, chat_template=self.template, **options)
        except Exception as error:  # a template is a stranger's program: it may raise anything
            raise UserError(
                f"the chat template of {self.host.name_or_path!r} fails: {error}; see chat.template"
            ) from error


def renderer_for(
    tokenizer: Any,
    pivot_tokenizer: Any,
    template: str,
    max_length: int,
    end_of_turn: bool = True,
    train_on: str = "all",
) -> ChatRenderer:
    """The renderer that ``chat.template`` names: ``pivot``, ``native``, ``plain`` (text as it is) or a Jinja text."""
    host = None
    if template == "pivot":
        host, template = pivot_tokenizer, "native"
    elif template == "plain":
        template = PLAIN_TEMPLATE
    options: dict[str, Any] = {"max_length": max_length, "end_of_turn": end_of_turn, "train_on": train_on}
    return ChatRenderer(tokenizer, template=template, host=host, **options)
