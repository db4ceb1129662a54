"""What is known of two stores before they are aligned: the same chats, texts and tokens, special tokens of one role."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fusechat.app.errors import UserError
from fusechat.chats.vocabulary import special_roles
from fusechat.stores.store import DistributionStore


def check_chats(pivot: DistributionStore, source: DistributionStore) -> None:
    """Raises `UserError` where two stores are not of the same chats in the same order."""
    if pivot.manifest["chats"] != source.manifest["chats"] or len(pivot) != len(source):
        raise UserError(
            f"{source.path} ({len(source)} chats) and {pivot.path} ({len(pivot)}) hold different chats; "
            "extract both with the same chat.path and chat.limit"
        )


def check_texts(pivot: DistributionStore, source: DistributionStore, tokenizers: tuple[Any, Any]) -> None:
    """Raises `UserError` where a chat's assistant text differs between two renderings, with both excerpts."""
    hashes = ((pivot.arrow("text_hash", *rows), source.arrow("text_hash", *rows)) for rows in pivot.ranges)
    differing = np.flatnonzero(np.concatenate([pc.not_equal(*pair).to_numpy() for pair in hashes]))
    if not len(differing):
        return
    row = int(differing[0])
    pairs = zip(tokenizers, (pivot, source), strict=True)
    texts = [tokenizer.decode(store.gold(row), skip_special_tokens=True) for tokenizer, store in pairs]
    at = len(os.path.commonprefix(texts))
    excerpts = " / ".join(repr(text[max(0, at - 20) : at + 20]) for text in texts)
    trained = [store.manifest.get("train_on", "all") for store in (pivot, source)]
    mend = "set chat.template so that both keep the same text"
    if trained[0] != trained[1]:
        mend = f"extract both with the same chat.train_on, which was {trained[0]} / {trained[1]}"
    raise UserError(
        f"{len(differing)} chats read differently after rendering; the first is row {row}, character {at}: {excerpts} "
        f"(pivot / source); {mend}"
    )


def same_tokens(pivot: DistributionStore, source: DistributionStore) -> bool:
    """Whether both stores hold the same ids for every chat: vocabularies are shared and nothing is to be aligned."""
    if len(pivot) != len(source):
        return False
    wide = pa.list_(pa.int64())  # the narrowest type that holds a store's ids may differ where the ids do not
    return all(
        pivot.arrow(column, *rows).cast(wide).equals(source.arrow(column, *rows).cast(wide))
        for rows in pivot.ranges
        for column in ("input_ids", "positions")
    )


def role_pairs(
    pivot: DistributionStore, source: DistributionStore, tokenizers: tuple[Any, Any]
) -> list[tuple[int, int]]:
    """(source id, pivot id) of special tokens with the same role: bos, eos, and the token that closes a turn."""
    theirs, own = (special_roles(t, _closing(s)) for t, s in zip(tokenizers, (pivot, source), strict=True))
    return [(own[role], theirs[role]) for role in ("bos", "eos", "end_of_turn") if role in own and role in theirs]


def _closing(store: DistributionStore, chats: int = 200) -> int | None:
    """The token that ends the turns of a store's first chats, if it is one of the special tokens recorded there."""
    gold = (store.gold(row) for row in range(min(len(store), chats)))
    last = Counter(int(tokens[-1]) for tokens in gold if len(tokens))
    special = set(store.manifest["special_ids"])
    return next((index for index, _ in last.most_common() if index in special), None)
