"""What extraction writes: rows of a shard as Arrow, and counts of what was dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fusechat.chats.render import Rendered
from fusechat.stores.distributions import NOTHING, TopK
from fusechat.stores.encoding import encode_counts, encode_logprobs, encode_runs, encode_steps, narrowest
from fusechat.stores.writer import list_column

Row = dict[str, Any]
SCALARS = {"nats": pa.float64(), "bytes": pa.int32(), "tokens": pa.int32(), "end": pa.int32()}


def row(chat: Row, rendered: Rendered, top: TopK | None) -> Row:
    """One chat's columns. top: None where a logit was not finite; such a chat keeps its place, without positions."""
    kept = top if top is not None and len(rendered.positions) else NOTHING
    positions, boundaries = (part[: len(kept.gold_logprob)] for part in (rendered.positions, rendered.boundaries))
    present = ~kept.logprobs.isneginf()
    return {
        "id": chat["id"],
        "tag": chat["tag"],
        "text_hash": rendered.text_hash,
        "input_ids": rendered.input_ids,
        "positions": encode_runs(positions),
        "boundaries": encode_steps(boundaries),
        "counts": encode_counts(present.sum(-1).numpy()),
        "ids": kept.ids[present].numpy(),
        "logprobs": kept.logprobs[present].numpy(),
        "gold_logprob": kept.gold_logprob.numpy(),
        "nats": float(-kept.gold_logprob.double().sum()),
        "bytes": rendered.n_bytes if len(positions) else 0,
        "tokens": len(positions),
        "end": rendered.end,
        "truncated": rendered.truncated,
        "bad": top is None and len(rendered.positions) > 0,
    }


def table(rows: Sequence[Row], vocab_size: int, logprobs: str, max_length: int) -> pa.Table:
    """The columns of a shard. logprobs: how they are stored; the integers are as narrow as the sizes allow."""

    def column(key: str, dtype: Any) -> pa.Array:
        return list_column([row[key] for row in rows], dtype)

    ids = narrowest(vocab_size - 1)
    return pa.table(
        {
            **{key: [row[key] for row in rows] for key in ("id", "tag", "text_hash")},
            **{key: pa.array([row[key] for row in rows], kind) for key, kind in SCALARS.items()},
            "input_ids": column("input_ids", ids),
            "positions": column("positions", narrowest(max_length)),
            "boundaries": column("boundaries", np.uint8),
            "counts": column("counts", np.uint16),
            "ids": column("ids", ids),
            "logprobs": list_column([encode_logprobs(row["logprobs"], logprobs) for row in rows], np.dtype(logprobs)),
            "gold_logprob": column("gold_logprob", np.float16),
        }
    )


def statistics(rows: Sequence[Row]) -> dict[str, Any]:
    """Sums over a shard's chats, and the ids of those that gave nothing."""
    return {
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "positions": sum(row["tokens"] for row in rows),
        "nats": sum(row["nats"] for row in rows),
        "text_bytes": sum(row["bytes"] for row in rows),
        "truncated": sum(row["truncated"] for row in rows),
        "no_response": [row["id"] for row in rows if not row["tokens"] and not row["bad"]],
        "bad": [row["id"] for row in rows if row["bad"]],
    }
