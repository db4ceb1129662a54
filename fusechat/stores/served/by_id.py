"""Servers that read and name tokens by their ids, as vLLM does: ``prompt_logprobs``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from fusechat.app.endpoint import Endpoint
from fusechat.app.errors import UserError
from fusechat.chats.render import Rendered
from fusechat.stores.distributions import NEG_INF, TopK
from fusechat.stores.served.asked import Entry, Noted, completed

if TYPE_CHECKING:
    from fusechat.stores.served.server import Server

NOTHING = -9999.0  # how vLLM writes minus infinity, which JSON cannot
ABOVE = 0.01  # nats above 0, and mass above 1, that rounding may add
AGREE = 0.9  # of a chat's texts: some of the same tokens are written differently
Row = Mapping[int, Entry]


class ById:
    """A model behind vLLM's completions endpoint. rows: of the model's embedding, whose last ones may be padding."""

    def __init__(self, endpoint: Endpoint, server: Server, tokenizer: Any, rows: int) -> None:
        self.endpoint, self.section, self.model = endpoint, server.section, server.model
        self.tokenizer, self.tokens, self.rows = tokenizer, len(tokenizer), rows
        self._same_texts = False

    def top(self, rendered: Rendered, k: int) -> tuple[TopK, Noted]:
        """As `Asked`. Ids of the embedding's padding are tail mass; how many there were is noted."""
        sent, places = rendered.input_ids.tolist(), (rendered.positions + 1).tolist()
        rows = self._rows(sent, k)
        read = [self._read(rows[place], sent[place], place, k) for place in places]
        if not self._same_texts:
            self._check_texts([rows[place] or {} for place in places])
        ids = np.array([ids for ids, _, _ in read], np.int64).reshape(-1, k)
        logprobs = np.array([values for _, values, _ in read], np.float32).reshape(-1, k)
        gold = np.array([value for _, _, value in read], np.float32)
        self._check_values(ids, logprobs, gold)
        logprobs, gold = (np.where(values <= NOTHING, np.float32(NEG_INF), values) for values in (logprobs, gold))
        padding = ids >= self.tokens
        ids, logprobs = np.where(padding, 0, ids), np.where(padding, np.float32(NEG_INF), logprobs)
        found = TopK(torch.from_numpy(ids), torch.from_numpy(logprobs), torch.from_numpy(gold))
        return found, {"padding": int(padding.sum())}

    def answer(self, text: str, *, max_new_tokens: int, temperature: float, seed: int, stops: Sequence[int]) -> str:
        """As `Asked`."""
        sent = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        body = {"model": self.model, "prompt": sent, "max_tokens": max_new_tokens, "temperature": temperature}
        body |= {"seed": seed, "stop_token_ids": list(stops)}
        return completed(self.endpoint, self.section, body)["choices"][0].get("text", "").strip()

    def _rows(self, sent: list[int], k: int) -> Sequence[Row | None]:
        """What is listed for every token of a prompt: the likeliest that might have stood there, and itself."""
        body = {"model": self.model, "prompt": sent, "max_tokens": 1, "temperature": 0.0}
        body |= {"prompt_logprobs": k, "return_token_ids": True}
        choice = completed(self.endpoint, self.section, body)["choices"][0]
        rows, read = choice.get("prompt_logprobs"), choice.get("prompt_token_ids")
        if rows is None:
            hint = f"{self.section}.engine=text_server asks for texts where a server knows no ids"
            raise UserError(f"{self.endpoint.name} answers without prompt_logprobs, as vLLM has them; {hint}")
        if read is None:
            raise UserError(
                f"{self.endpoint.name} does not say which tokens it read (prompt_token_ids); vLLM does from 0.10.2 on"
            )
        if read != sent:
            at = next((i for i, pair in enumerate(zip(read, sent, strict=False)) if pair[0] != pair[1]), len(read))
            raise UserError(
                f"{self.endpoint.name} has read {len(read)} tokens where {len(sent)} were sent, others from place {at} "
                f"on; {self.section}.base_url must lead to the model itself, with nothing in between that edits prompts"
            )
        if len(rows) != len(sent):
            raise UserError(
                f"{self.endpoint.name} lists log-probabilities of {len(rows)} tokens where {len(sent)} were sent; "
                "serve it with vLLM's own completions endpoint"
            )
        return rows

    def _read(self, row: Row | None, gold: int, place: int, k: int) -> tuple[list[int], list[float], float]:
        """Ids and log-probabilities of the k likeliest tokens, falling, and that of the token that stands there."""
        entries = {token: entry.get("logprob", NOTHING) for token, entry in (row or {}).items()}
        if gold not in entries:
            raise UserError(
                f"{self.endpoint.name} lists nothing for token {gold}, which was sent at place {place}; serve "
                f"{self.model} with vLLM's own completions endpoint"
            )
        if not k <= len(entries) <= k + 1:
            raise UserError(
                f"{self.endpoint.name} lists {len(entries)} tokens at place {place}, expected {k} or {k + 1} "
                f"(extract.top_k, and the token itself); serve it with --max-logprobs {k} or more"
            )
        value = entries[gold]
        if len(entries) > k:
            del entries[gold]
        ordered = sorted(entries.items(), key=lambda pair: -pair[1])
        return [token for token, _ in ordered], [logprob for _, logprob in ordered], value

    def _check_values(self, ids: npt.NDArray[np.int64], *logprobs: npt.NDArray[np.float32]) -> None:
        """Raises `UserError` for what no log-probabilities of this vocabulary can be."""
        if ids.size and (most := int(ids.max())) >= self.rows:
            raise UserError(
                f"{self.endpoint.name} names token {most}, the model of {self.section}.path has {self.rows}; give the "
                f"path of the model that is served, or its name there with {self.section}.model"
            )
        top = logprobs[0]
        highest = max((float(np.nanmax(part)) for part in logprobs if np.isfinite(part).any()), default=0.0)
        mass = float(np.nanmax(np.exp(np.minimum(top, 0.0)).sum(1))) if np.isfinite(top).any() else 0.0
        if highest > ABOVE or mass > 1 + ABOVE:
            found = f"a log-probability {highest:.2f}" if highest > ABOVE else f"probabilities that sum to {mass:.2f}"
            raise UserError(f"{self.endpoint.name} lists {found}; serve it with --logprobs-mode raw_logprobs")

    def _check_texts(self, rows: Sequence[Row]) -> None:
        """Raises `UserError` where the server's ids stand for other texts than the tokenizer's."""
        named = {
            token: entry.get("decoded_token") for row in rows for token, entry in row.items() if token < self.tokens
        }
        pairs = [(token, text, str(self.tokenizer.decode([token]))) for token, text in named.items() if text]
        other = [pair for pair in pairs if pair[1].strip() != pair[2].strip() and pair[1].isascii()]
        if len(other) > (1 - AGREE) * len(pairs):
            token, theirs, ours = other[0]
            raise UserError(
                f"{self.endpoint.name} writes token {token} as {theirs!r}, the tokenizer of {self.section}.path as "
                f"{ours!r}; give the path of the model that is served"
            )
        self._same_texts = bool(pairs)
