"""Chats as a tokenizer reads them, and how two readings of the same chats meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from fusechat.align.alignment import Alignment
from fusechat.align.paths import lexicon
from fusechat.align.sequence import SEQUENCES, align_chain
from fusechat.align.stage import sequence_for, token_texts
from fusechat.chats.render import ChatRenderer, Rendered
from fusechat.chats.roles import Message
from fusechat.stores.kinds import INSIDE, KINDS, NONE
from fusechat.stores.store import DistributionStore

LOST = ("inside a word", "inside signs", "white space", "digits", "inside a character", "template", "elsewhere")
"""Why a position has no partner. inside a word, inside signs: the source has one token for what the pivot splits."""


@dataclass(frozen=True)
class Reading:
    """The chats as one model reads them. It answers like a store that extraction would make, with no distributions."""

    name: str
    tokenizer: Any
    rendered: Sequence[Rendered]
    manifest: dict[str, Any] = field(default_factory=dict)

    def row(self, index: int, *columns: str) -> tuple[npt.NDArray[Any], ...]:
        """Columns of one chat: input_ids, positions, boundaries."""
        return tuple(getattr(self.rendered[index], column) for column in columns)

    @property
    def ends(self) -> npt.NDArray[np.int64]:
        """Where each chat's predictions end."""
        return np.array([chat.end for chat in self.rendered], np.int64)

    def gold(self, index: int) -> npt.NDArray[np.int64]:
        """What each position of one chat predicts."""
        chat = self.rendered[index]
        return chat.input_ids[chat.positions + 1]

    def numbers(self) -> dict[str, float]:
        """chats, tokens, longest (in tokens); trained: share of tokens; cut, without_answer: shares of chats."""
        lengths = np.array([len(chat.input_ids) for chat in self.rendered])
        trained = sum(int(chat.assistant_mask.sum()) for chat in self.rendered)
        cut = sum(chat.truncated for chat in self.rendered)
        empty = sum(len(chat.positions) == 0 for chat in self.rendered)
        total = max(1, len(lengths))
        shares = {"trained": trained / max(1, int(lengths.sum())), "cut": cut / total, "without_answer": empty / total}
        return {"chats": len(lengths), "tokens": int(lengths.sum()), "longest": int(lengths.max(initial=0)), **shares}


def read(name: str, renderer: ChatRenderer, chats: Sequence[Sequence[Message]]) -> Reading:
    """Chats through a renderer. Raises `UserError` for what the template cannot render."""
    tokenizer = renderer.tokenizer
    return Reading(name, tokenizer, renderer(chats), {"offsets": tokenizer.is_fast, "vocab_size": len(tokenizer)})


def meeting(pivot: Reading, source: Reading, sequence: str) -> list[npt.NDArray[np.uint8]]:
    """How each of the pivot's positions finds its partner, chat by chat: kinds as in `fusechat.stores.kinds`."""
    sequence = sequence_for(sequence, all(reading.manifest["offsets"] for reading in (pivot, source)))
    stores = [cast(DistributionStore, reading) for reading in (pivot, source)]
    alignment = Alignment(stores[0], stores[1], sequence, unmatched="skip", chained=False, logprobs="float16")
    if "texts" in SEQUENCES[sequence].needs:
        alignment.texts = token_texts(pivot.tokenizer), token_texts(source.tokenizer)
    if "path" in SEQUENCES[sequence].needs:
        alignment.words = lexicon(source.tokenizer, pivot.tokenizer)
    return [alignment.match(row)[1] for row in range(len(pivot.rendered))]


def lost(pivot: Reading, source: Reading, kinds: Sequence[npt.NDArray[np.uint8]]) -> dict[str, float]:
    """What the positions without a partner predict, by `LOST`, as shares of all positions."""
    special = {index for index, token in pivot.tokenizer.added_tokens_decoder.items() if token.special}
    seen, total = Counter[str](), 0
    for chat, other, kind in zip(pivot.rendered, source.rendered, kinds, strict=True):
        total += len(kind)
        places = [np.append(side.boundaries, side.end) for side in (chat, other)]
        within = align_chain(*places)[1] == INSIDE
        for at in np.flatnonzero(kind == NONE).tolist():
            token = int(chat.positions[at]) + 1
            text = chat.text[slice(*chat.char_spans[token].tolist())]
            is_special = int(chat.input_ids[token]) in special
            seen[_why(text, is_special, int(chat.boundaries[at]) < 0, bool(within[at]))] += 1
    return {name: seen[name] / max(1, total) for name in LOST}


def _why(text: str, special: bool, character: bool, within: bool) -> str:
    if special:
        return "template"
    if not text.strip():
        return "white space"
    if text.strip().isdigit():
        return "digits"
    if character:
        return "inside a character"
    if not within:
        return "elsewhere"
    return "inside a word" if any(c.isalpha() for c in text) else "inside signs"


def shares(kinds: Sequence[npt.NDArray[np.uint8]]) -> dict[str, float]:
    """The share of each kind among all positions."""
    seen = Counter({kind: sum(int((chat == number).sum()) for chat in kinds) for number, kind in enumerate(KINDS)})
    return {kind: seen[kind] / max(1, seen.total()) for kind in KINDS}
