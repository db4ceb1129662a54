"""What extraction writes: rows of a shard as Arrow, and counts of what was dropped."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fusechat.app.errors import UserError
from fusechat.chats.render import Rendered
from fusechat.extract.batches import Batch
from fusechat.stores.distributions import TopK
from fusechat.stores.encoding import encode_counts, encode_logprobs, encode_runs, encode_steps, narrowest
from fusechat.stores.store import StoreWriter, list_column

LOG = logging.getLogger(__name__)
SCALARS = {"nats": pa.float64(), "bytes": pa.int32(), "tokens": pa.int32()}


class ShardWriter(BasePredictionWriter):
    """Collects a shard's chats and writes it when it is whole; counts what was dropped and why."""

    def __init__(
        self, writer: StoreWriter, vocab_size: int, logprobs: str, max_length: int, max_bad_fraction: float, total: int
    ) -> None:
        super().__init__("batch")
        self.writer, self.vocab_size, self.logprobs = writer, vocab_size, logprobs
        self.max_length, self.max_bad, self.total = max_length, max_bad_fraction, total
        self.rows: dict[int, dict[str, Any]] = {}
        self.bad: list[str] = []
        rate = TextColumn("{task.fields[rate]}")
        bar = (TextColumn("extract"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
        self.progress = Progress(*bar, transient=True)
        self.task = self.progress.add_task("chats", total=total, rate="")
        self.tokens = 0

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Counts what an earlier run has left."""
        whole = [entry for i in range(self.writer.total) if (entry := self.writer.done(i))]
        if whole:
            LOG.info("going on after %d whole shards of %d", len(whole), self.writer.total)
        self.progress.update(self.task, completed=sum(entry["rows"] for entry in whole))
        self.bad = [identity for entry in whole for identity in entry["statistics"]["bad"]]
        self.progress.start()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Ends the progress bar, also after an error."""
        self.progress.stop()

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, batch: Batch, *args: Any
    ) -> None:
        """Keeps the batch's rows; writes the shard with its last batch."""
        for place, chat, rendered, top in zip(batch.rows, batch.chats, batch.rendered, prediction, strict=True):
            self.rows[place] = _row(chat, rendered, top)
            self.tokens += len(rendered.input_ids)
            if top is None:
                self.bad.append(chat["id"])
        if len(self.bad) > self.max_bad * self.total:
            raise UserError(
                f"{len(self.bad)} of {self.total} chats gave NaN or inf (first: {self.bad[0]}), more than "
                f"extract.max_bad_fraction={self.max_bad}; try source.dtype=float32 or bfloat16"
            )
        elapsed = self.progress.tasks[0].elapsed or 1e-9
        self.progress.update(self.task, advance=len(batch.rows), rate=f"{self.tokens / elapsed:,.0f} tokens/s")
        if batch.last:
            rows = [self.rows[i] for i in range(len(self.rows))]
            table = _table(rows, self.vocab_size, self.logprobs, self.max_length)
            self.writer.write(batch.shard, table, _statistics(rows))
            self.rows = {}


NOTHING = TopK(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1), torch.zeros(0))


def _row(chat: dict[str, Any], rendered: Rendered, top: TopK | None) -> dict[str, Any]:
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
        "truncated": rendered.truncated,
        "bad": top is None and len(rendered.positions) > 0,
    }


def _table(rows: list[dict[str, Any]], vocab_size: int, logprobs: str, max_length: int) -> pa.Table:
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


def _statistics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "positions": sum(row["tokens"] for row in rows),
        "nats": sum(row["nats"] for row in rows),
        "text_bytes": sum(row["bytes"] for row in rows),
        "truncated": sum(row["truncated"] for row in rows),
        "no_response": [row["id"] for row in rows if not row["tokens"] and not row["bad"]],
        "bad": [row["id"] for row in rows if row["bad"]],
    }
