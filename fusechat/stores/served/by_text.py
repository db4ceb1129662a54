"""Servers that name tokens by their texts alone: ``echo`` with ``logprobs``, as llama-cpp-python has them.

A text that belongs to exactly one id is taken for it; what is listed under any other is tail mass, noted as ``lost``.

llama-cpp-python lists, for a prompt that begins with the token BOS, each later token beside the distribution before it,
and one token that it has made itself. Without BOS it lists every token beside the distribution *after* it, a row early,
so that a token's own log-probability is known by its text alone. BOS tokens themselves are never listed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fusechat.app.endpoint import Endpoint
from fusechat.app.errors import UserError
from fusechat.chats.render import Rendered
from fusechat.chats.vocabulary import token_bytes
from fusechat.stores.distributions import NEG_INF, TopK
from fusechat.stores.served.asked import Completion, Noted, completed

if TYPE_CHECKING:
    from fusechat.stores.served.server import Server

WIDE = 1000  # entries asked for where a token's own log-probability is to be found among them
ENOUGH = 50  # more texts that fit a place aside show that distributions are not beside their tokens


@dataclass(frozen=True)
class Row:
    """What is listed for a position: the likeliest tokens by text, and one of which more is known.

    own: that one's id, text and log-probability: the token after the position, or where rows come early the one at it.
    """

    entries: Mapping[str, float]
    own: tuple[int, str, float]


@dataclass(frozen=True)
class Read:
    """A row by ids. gold: log-probability of the next token, at most where ``bounded``; lost: mass without an id, at
    most."""

    taken: Mapping[int, float]
    gold: float
    lost: float
    bounded: bool


class ByText:
    """A model behind a completions endpoint without ids."""

    def __init__(self, endpoint: Endpoint, server: Server, tokenizer: Any) -> None:
        self.endpoint, self.section, self.model, self.tokenizer = endpoint, server.section, server.model, tokenizer
        self.texts, self.bos = texts_of(tokenizer), tokenizer.bos_token_id
        self.ids: dict[str, int | None] = {}  # None: no single id has this text
        for index, texts in enumerate(self.texts):
            self.ids |= {text: None if text in self.ids or not text else index for text in texts}
        self.early, self.adds_bos = False, self._adds_bos()
        self._fit, self._lock = np.zeros(2, np.int64), threading.Lock()

    def top(self, rendered: Rendered, k: int) -> tuple[TopK, Noted]:
        """As `Asked`. lost: mass without an id, at most; bounded: next tokens whose log-probability is not listed."""
        wide = min(max(k, WIDE), len(self.texts))
        asked = wide if self.early else k
        rows, early = self._rows(rendered, asked)
        if early and asked < wide:
            self.early = True
            return self.top(rendered, k)
        read = [
            self._read(rows.get(at), int(rendered.input_ids[at + 1]), at, asked) for at in rendered.positions.tolist()
        ]
        ids, logprobs = np.zeros((len(read), k), np.int64), np.full((len(read), k), NEG_INF, np.float32)
        for n, one in enumerate(read):
            best = sorted(one.taken.items(), key=lambda pair: -pair[1])[:k]
            ids[n, : len(best)], logprobs[n, : len(best)] = [i for i, _ in best], [value for _, value in best]
        gold = torch.tensor([one.gold for one in read], dtype=torch.float32)
        noted = {"lost": sum(one.lost for one in read), "bounded": sum(one.bounded for one in read)}
        return TopK(torch.from_numpy(ids), torch.from_numpy(logprobs), gold), noted

    def answer(self, text: str, *, max_new_tokens: int, temperature: float, seed: int, stops: Sequence[int]) -> str:
        """As `Asked`."""
        body = {"prompt": self._prompt(text), "max_tokens": max_new_tokens, "seed": seed, "temperature": temperature}
        body |= {"stop": [str(self.tokenizer.decode([index])) for index in stops]}
        return self._completed(body)["choices"][0].get("text", "").strip()

    def _rows(self, rendered: Rendered, asked: int) -> tuple[dict[int, Row], bool]:
        """Position -> what is listed for it, and whether rows come early."""
        ids = rendered.input_ids.tolist()
        text = rendered.text[: int(rendered.char_spans[:, 1].max())]  # a chat that was cut ends there
        answer = self._completed({"prompt": self._prompt(text), "echo": True, "logprobs": asked, "max_tokens": 1})
        listed = answer["choices"][0].get("logprobs") or {}
        tokens, tops = listed.get("tokens") or [], listed.get("top_logprobs") or []
        values = listed.get("token_logprobs") or []
        if not tokens or not len(tokens) == len(tops) == len(values):
            raise UserError(
                f"{self.endpoint.name} lists no log-probabilities of the prompt (echo with logprobs); llama-cpp-python "
                "does with --logits_all true, llama.cpp's own server never does"
            )
        places = self._places(ids, tokens, (answer.get("usage") or {}).get("prompt_tokens"))
        early = len(tokens) == len(places) and not (ids[0] == self.bos and places[0])
        self._check_fit(places, tokens, tops, early)
        rows = {}
        for place, text, entries, value in zip(places, tokens, tops, values, strict=False):
            if entries is not None and value is not None:
                rows[place if early else place - 1] = Row(entries, (ids[place], text, value))
        return rows, early

    def _places(self, ids: Sequence[int], tokens: Sequence[str], read: int | None) -> list[int]:
        """Which of the tokens sent each of those listed is; behind them the server may list one that it has made."""
        at = 0
        if read in (None, len(ids)):
            for places in ([i for i, token in enumerate(ids) if token != self.bos], list(range(len(ids)))):
                fits = [text in self.texts[ids[place]] for place, text in zip(places, tokens, strict=False)]
                if all(fits) and 0 <= len(tokens) - len(places) <= 1:
                    return places
                at = max(at, fits.index(False) if False in fits else min(len(fits), len(places)))
        shown = " ".join(map(repr, tokens[at : at + 3]))
        ours = " ".join(repr(self.tokenizer.decode([token])) for token in ids[at : at + 3])
        raise UserError(
            f"{self.endpoint.name} reads a chat as {read or len(tokens)} tokens, {shown} at place {at}, where the "
            f"tokenizer of {self.section}.path has {len(ids)}, {ours}; give the path of the file that is served, or "
            f"serve it where token ids can be sent ({self.section}.engine=server)"
        )

    def _check_fit(
        self, places: Sequence[int], tokens: Sequence[str], tops: Sequence[Mapping[str, float] | None], early: bool
    ) -> None:
        """Raises `UserError` where distributions belong to other tokens than those that they are taken for.

        Of the first chats: how often the likeliest text is that of the token beside it, and of the one after that.
        """
        best = [max(entries, key=lambda text: entries[text]) if entries else None for entries in tops]
        beside = sum(text == token for text, token in zip(best, tokens, strict=True))
        after = sum(text == token for text, token in zip(best, tokens[1:], strict=False))
        with self._lock:
            self._fit += (after, beside) if early else (beside, after)
            taken, other = self._fit.tolist()
        if other > taken + ENOUGH:
            raise UserError(
                f"{self.endpoint.name} lists distributions beside other tokens than those that they predict ({taken} "
                f"of the likeliest texts fit, {other} one place aside); this version of it is not known here: serve "
                f"{self.model} with vLLM ({self.section}.engine=server)"
            )

    def _read(self, row: Row | None, token: int, at: int, asked: int) -> Read:
        """A row by ids. token: the next one; asked: how many entries were wanted."""
        if row is None:
            raise UserError(
                f"{self.endpoint.name} lists nothing for the token at place {at + 1}: servers leave out a "
                "prompt's first; let chats begin with another role (chat.template)"
            )
        own, text, value = row.own
        others = {other: logprob for other, logprob in row.entries.items() if other != text}
        taken = {index: logprob for other, logprob in others.items() if (index := self.ids.get(other)) is not None}
        above = sum(logprob > value for logprob in others.values())
        if above < asked:
            taken[own] = value
        hidden = [logprob for other, logprob in others.items() if self.ids.get(other) is None]
        left = max(1.0 - sum(map(math.exp, taken.values())), 0.0)
        if not hidden and self.ids.get(text) is not None:
            lost = 0.0
        elif len(others) >= asked or (len(others) == asked - 1 and above < len(others)):  # no text hides another
            lost = min(sum(map(math.exp, hidden)), left)
        else:
            lost = left
        if token == own:
            return Read(taken, value, lost, False)
        gold = taken.get(token)
        if gold is not None:
            return Read(taken, gold, lost, False)
        most = math.log(max(left, 1e-9))
        alone = any(self.ids.get(name) == token for name in self.texts[token])
        return Read(taken, min(most, *row.entries.values()) if alone else most, lost, True)

    def _adds_bos(self) -> bool:
        """Whether the server puts BOS before every prompt by itself."""
        if self.bos is None:
            return False
        text = f"{self.tokenizer.bos_token}a"
        usage = self._completed({"prompt": text, "max_tokens": 1}).get("usage") or {}
        ours = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return usage.get("prompt_tokens", ours) == ours + 1

    def _prompt(self, text: str) -> str:
        """A text as the server wants it: without the BOS that it adds."""
        return text.removeprefix(self.tokenizer.bos_token) if self.adds_bos else text

    def _completed(self, body: Mapping[str, Any]) -> Completion:
        return completed(self.endpoint, self.section, {"model": self.model, "temperature": 0.0, **body})


def texts_of(tokenizer: Any) -> list[frozenset[str]]:
    """How servers may write each id's token: its bytes as text, what is none left out or replaced; special tokens as
    themselves or as nothing."""
    special = {index: str(token.content) for index, token in tokenizer.added_tokens_decoder.items()}
    return [
        frozenset({"", special.get(index, "")})
        if piece is None
        else frozenset(piece.decode(errors=errors) for errors in ("ignore", "replace"))
        for index, piece in enumerate(token_bytes(tokenizer))
    ]
