"""Chats of one's own to validate with: read as the pivot's distributions were, scored by cross entropy alone."""

from __future__ import annotations

import logging
from typing import Any

import datasets
import numpy as np

from fusechat.app.errors import UserError
from fusechat.chats.formats import load_chats
from fusechat.chats.mixture import Given, paths_of
from fusechat.chats.render import ChatRenderer, Rendered
from fusechat.stores.encoding import Array
from fusechat.stores.store import DistributionStore

LOG = logging.getLogger(__name__)
NONE = {"ids": np.int64, "logprobs": np.float16}  # entries of any model


class ValidationChats(DistributionStore):
    """Rendered chats in memory, as a store of which no position has a distribution: lambda is 1 there."""

    def __init__(self, rendered: list[Rendered], tags: list[str]) -> None:
        self.rendered = rendered
        self.scalars = {
            "tokens": np.array([len(r.positions) for r in rendered], np.int64),
            "bytes": np.array([r.n_bytes for r in rendered], np.int64),
            "nats": np.zeros(len(rendered)),
            "tag": np.array(tags, object),
        }

    def __len__(self) -> int:
        return len(self.rendered)

    @property
    def columns(self) -> list[str]:
        """The names of the scalar columns."""
        return list(self.scalars)

    def column(self, name: str) -> Array:
        """A whole scalar column."""
        return self.scalars[name]

    def text(self, index: int, name: str) -> str:
        """One row of a column of strings."""
        return str(self.scalars[name][index])

    def row(self, index: int, *columns: str) -> tuple[Array, ...]:
        """The named list columns of one chat."""
        chat = self.rendered[index]
        absent = np.zeros(len(chat.positions), np.int64)
        lists = {"input_ids": chat.input_ids, "positions": chat.positions, "counts": absent, "gold_logprob": absent}
        return tuple(lists[name] if name in lists else np.empty(0, NONE[name]) for name in columns)


def read_chats(path: Given) -> datasets.Dataset:
    """The chats that ``validation.path`` names, as chat.path does. Raises `UserError` that names the key."""
    try:
        return load_chats(path)[0]
    except UserError as error:
        raise UserError(f"validation.path={', '.join(paths_of(path))}: {error}") from error


def warn_of_trained(chats: datasets.Dataset, store: DistributionStore) -> None:
    """Says how many of one's own chats are trained on too: of one file, parts of a mixture are drawn alike."""
    known = set(chats["id"])
    trained = {identity for rows in store.ranges for identity in store.arrow("id", *rows).to_pylist()}
    if count := len(known & trained):
        LOG.warning(
            "%d of %d chats of validation.path are trained on too: held out is less than it says", count, len(known)
        )


def validation_chats(chats: datasets.Dataset, tokenizer: Any, manifest: dict[str, Any]) -> ValidationChats:
    """Chats in the pivot's tokens, by the template of its store, whose manifest this is; those without an answer go.

    Raises `UserError` where none has an answer.
    """
    renderer = ChatRenderer(
        tokenizer,
        template=manifest["template"],
        max_length=manifest["max_length"],
        end_of_turn=manifest["end_of_turn"],
        train_on=manifest.get("train_on", "all"),
    )
    rendered = renderer(chats["messages"])
    kept = [(chat, tag) for chat, tag in zip(rendered, chats["tag"], strict=True) if len(chat.positions)]
    if not kept:
        raise UserError("validation.path holds no chat with an assistant's answer; give chats as in chat.path, or null")
    return ValidationChats([chat for chat, _ in kept], [tag for _, tag in kept])
