"""What a served model is asked, whatever the server's own words for it are; and completions as servers write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Protocol

from annotated_types import Len
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from fusechat.app.endpoint import SHOWN, Endpoint
from fusechat.app.errors import UserError
from fusechat.chats.render import Rendered
from fusechat.stores.distributions import TopK

Noted = Mapping[str, float]  # what is counted, by name; sums over chats are kept with a shard


class Asked(Protocol):
    """A served model, for several threads at a time. Raises `UserError` for answers that do not fit what was sent."""

    def top(self, rendered: Rendered, k: int) -> tuple[TopK, Noted]:
        """The k likeliest tokens at a chat's response positions, [R, k] at most, and what there was to note."""

    def answer(self, text: str, *, max_new_tokens: int, temperature: float, seed: int, stops: Sequence[int]) -> str:
        """What follows a prompt; greedy at temperature 0. stops: tokens that end it beside the server's own."""


class Entry(TypedDict, total=False):
    """A token at a place of the prompt. decoded_token: its text."""

    logprob: float
    decoded_token: str | None


class Texts(TypedDict, total=False):
    """Log-probabilities by text. Lists are as long as ``tokens``; the first of each is null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None


class Choice(TypedDict, total=False):
    """A completion. prompt_token_ids and prompt_logprobs are vLLM's."""

    text: str
    logprobs: Texts | None
    prompt_logprobs: list[dict[int, Entry] | None] | None
    prompt_token_ids: list[int] | None


class Usage(TypedDict, total=False):
    prompt_tokens: int


class Completion(TypedDict, total=False):
    choices: Annotated[list[Choice], Len(1)]
    usage: Usage | None


def completed(endpoint: Endpoint, section: str, body: Mapping[str, Any]) -> Completion:
    """The answer to POST /completions. Raises `UserError` for anything else than a completion."""
    content = endpoint.post("/completions", body)
    try:
        answer: Completion = _completions().validate_json(content)
    except ValidationError as error:
        shown = " ".join(content[: 4 * SHOWN].decode(errors="replace").split())[:SHOWN]
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        what = f"{where}: {first['msg']}" if where else "no JSON"
        raise UserError(
            f"{endpoint.name} answers with no completion ({what}): {shown!r}; is {section}.base_url the address of an "
            "OpenAI-compatible server, up to and with /v1?"
        ) from None
    if "choices" not in answer:
        raise UserError(f"{endpoint.name} answers without choices; see {section}.base_url")
    return answer


@cache
def _completions() -> TypeAdapter[Completion]:
    return TypeAdapter(Completion)
