"""Where a model is served, and how it is asked."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from fusechat.app.endpoint import Endpoint
from fusechat.app.errors import UserError, one_of
from fusechat.app.settings import check

if TYPE_CHECKING:
    from fusechat.stores.served.asked import Asked

ENGINES = ("server", "text_server")
HERE = "transformers"  # the engine that asks nobody
KEYS = ("engine", "base_url", "model", "key_env", "requests", "retries", "wait")
TIMEOUT = 600.0  # seconds: many requests wait in a server's queue


class Listed(TypedDict, total=False):
    """A model in the answer to GET /models. max_model_len: vLLM's."""

    id: str
    max_model_len: int | None


class Models(TypedDict):
    data: list[Listed]


@dataclass(frozen=True)
class Server:
    """A model behind an OpenAI-compatible completions endpoint.

    base_url: up to and with /v1; model: its name there; key: bearer token. engine: ``server`` (token ids in and out, as
    vLLM has them) or ``text_server`` (texts alone, as llama-cpp-python has them). requests: under way at a time;
    retries, wait: of an `Endpoint`. section: of the config, for messages.
    """

    base_url: str
    model: str
    engine: str = "server"
    key: str | None = field(default=None, repr=False)
    requests: int = 16
    retries: int = 6
    wait: float = 1.0
    section: str = "source"

    def __post_init__(self) -> None:
        one_of(self.engine, ENGINES, f"{self.section}.engine")
        given = {"base_url": self.base_url, "model": self.model, "requests": self.requests}
        check("source", **given, retries=self.retries, wait=self.wait)

    @property
    def decides(self) -> dict[str, str]:
        """What of it decides numbers: not where it is, nor how it is asked."""
        return {"engine": self.engine, "served": self.model}

    @contextmanager
    def asked(self, tokenizer: Any, path: str, *, tokens: int, kept: str, **options: Any) -> Iterator[Asked]:
        """The model, ready to be asked for the time of a block.

        tokenizer, path: its own, with options of `embedding_rows`; tokens: of the longest text; kept: what a failure
        leaves whole. Raises `UserError` where the server has no such model, or one with a shorter context.
        """
        from fusechat.models.load import embedding_rows
        from fusechat.stores.served.by_id import ById
        from fusechat.stores.served.by_text import ByText

        limits = "--max-logprobs (from extract.top_k on) and --max-model-len (above chat.max_length) are its limits"
        how: dict[str, Any] = {"retries": self.retries, "wait": self.wait, "timeout": TIMEOUT, "kept": kept}
        with Endpoint(self.base_url, self.key, self.section, remedies={400: limits, 413: limits}, **how) as endpoint:
            self._check(endpoint, tokens)
            if self.engine == "server":
                yield ById(endpoint, self, tokenizer, embedding_rows(path, **options) or len(tokenizer))
            else:
                yield ByText(endpoint, self, tokenizer)

    def _check(self, endpoint: Endpoint, tokens: int) -> None:
        status, content = endpoint.send("GET", "/models")
        if status in (401, 403):
            raise endpoint.refused(status, content)
        try:
            listed = {entry["id"]: entry for entry in _models().validate_json(content)["data"] if "id" in entry}
        except ValidationError:
            return  # a server need not list what it has; where this is none, the first chat tells
        if listed and self.model not in listed:
            known = ", ".join(sorted(listed))
            raise UserError(
                f"{endpoint.name} serves no model {self.model!r}; set {self.section}.model to one of: {known}"
            )
        most = listed.get(self.model, {}).get("max_model_len")
        if most and tokens >= most:  # one more is made
            raise UserError(
                f"{endpoint.name} reads at most {most} tokens, one of them its own; chat.max_length={tokens} wants one "
                f"more than that: set chat.max_length={most - 1}, or serve it with --max-model-len {tokens + 1}"
            )


@cache
def _models() -> TypeAdapter[Models]:
    return TypeAdapter(Models)


def server_of(options: MutableMapping[str, Any], named: str | None, section: str) -> Server | None:
    """Takes the keys of a server out of a section's options; None where the model runs here.

    named: the model's name where the section gives none. The key comes from the environment.
    """
    found = {key: options.pop(key) for key in KEYS if key in options}
    if found.get("engine", HERE) == HERE:
        return None
    key = os.environ.get(found.pop("key_env", ""))
    return Server(**{**found, "model": found.get("model") or named}, key=key, section=section)
