"""Who is measured: a model that runs here, or one behind a server. Both score chats and answer prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fusechat.app.endpoint import in_flight
from fusechat.app.errors import UserError
from fusechat.app.trainer import seed_everything

if TYPE_CHECKING:
    from fusechat.chats.render import ChatRenderer, Rendered
    from fusechat.chats.roles import Message
    from fusechat.stores.served.asked import Asked
    from fusechat.stores.served.server import Server

Prompts = Sequence[Sequence["Message"]]
Tell = Callable[[int], None]  # called with how many more are answered


class Speaker(Protocol):
    """A model that is ready."""

    def score(self, chats: Prompts) -> list[dict[str, float]]:
        """nats, bytes, tokens and hits of every chat's response, in the order given."""

    def answer(self, prompts: Prompts, temperature: float = 0.0, tell: Tell | None = None) -> list[str]:
        """An answer to every prompt, greedy at temperature 0; the same ones whenever it is asked."""


class Here:
    """A model on a device. settings: batch_size and max_new_tokens."""

    def __init__(self, model: Any, renderer: ChatRenderer, settings: Mapping[str, Any], seed: int) -> None:
        self.model, self.renderer, self.settings, self.seed = model, renderer, settings, seed

    def score(self, chats: Prompts) -> list[dict[str, float]]:
        """As `Speaker`."""
        from fusechat.evaluate.perplexity import score

        return score(self.model, self.renderer, chats, self.settings["batch_size"])

    def answer(self, prompts: Prompts, temperature: float = 0.0, tell: Tell | None = None) -> list[str]:
        """As `Speaker`."""
        from fusechat.evaluate.generation import generate

        seed_everything(self.seed)
        limits = {"max_new_tokens": self.settings["max_new_tokens"], "batch_size": self.settings["batch_size"]}
        return generate(self.model, self.renderer, prompts, temperature=temperature, tell=tell, **limits)


class There:
    """A model behind a server. stops: tokens that end an answer; limit: tokens of an answer."""

    def __init__(
        self, asked: Asked, server: Server, renderer: ChatRenderer, *, limit: int, stops: Sequence[int], seed: int
    ) -> None:
        self.asked, self.server, self.renderer = asked, server, renderer
        self.options: dict[str, Any] = {"max_new_tokens": limit, "stops": stops, "seed": seed}

    def score(self, chats: Prompts) -> list[dict[str, float]]:
        """As `Speaker`. Raises `UserError` where a server names no ids: what is likeliest is not known there."""
        if self.server.engine != "server":
            raise UserError(
                f"evaluation.engine={self.server.engine} gives answers alone (evaluation=mt_bench, alpaca_eval); bits "
                "per byte and likeliest tokens take evaluation.engine=server, or transformers"
            )
        return list(in_flight(self._score, self.renderer(chats), self.server.requests))

    def answer(self, prompts: Prompts, temperature: float = 0.0, tell: Tell | None = None) -> list[str]:
        """As `Speaker`."""
        texts = [self.renderer.prompt(messages) for messages in prompts]
        ask = lambda text: self.asked.answer(text, temperature=temperature, **self.options)
        answers = []
        for answer in in_flight(ask, texts, self.server.requests):
            answers.append(answer)
            if tell is not None:
                tell(1)
        return answers

    def _score(self, rendered: Rendered) -> dict[str, float]:
        found = {"nats": 0.0, "bytes": float(rendered.n_bytes), "tokens": float(len(rendered.positions)), "hits": 0.0}
        if len(rendered.positions):
            top, _ = self.asked.top(rendered, 1)
            gold = rendered.input_ids[rendered.positions + 1]
            found |= {
                "nats": -float(top.gold_logprob.double().sum()),
                "hits": float((top.ids[:, 0].numpy() == gold).sum()),
            }
            if not top.gold_logprob.isfinite().all():
                raise UserError(
                    f"{self.server.model} at {self.server.base_url} gives NaN, or no probability to a text that is "
                    "there; serve it in another type (--dtype)"
                )
        return found
