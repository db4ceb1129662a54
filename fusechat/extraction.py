"""Extraction as Lightning runs it: shards of chats -> batches by token budget -> distributions -> Arrow shards."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fusechat import models
from fusechat.chat import ChatRenderer, Rendered
from fusechat.distributions import TopK, encode_logprobs, id_type, sampled_from_logits, top_k_from_logits, top_p_from_logits
from fusechat.errors import UserError
from fusechat.heads import OutputHead
from fusechat.store import StoreWriter, list_column

LOG = logging.getLogger(__name__)
CHUNK_ELEMENTS = 1 << 24  # logits computed at a time: 64 MiB in fp32
CACHE_ELEMENTS = 1 << 21  # logits normalised and sorted at a time: 8 MiB stay in the cache


@dataclass
class Batch:
    """Chats of one shard run together. rows: their places in the shard; last: the shard ends with this batch."""

    shard: int
    rows: list[int]
    chats: list[dict[str, Any]]
    rendered: list[Rendered]
    last: bool


class ShardBatches(IterableDataset[Batch]):
    """Batches of the shards this rank still has to do. Batches never cross shards, so a resumed run is the same run."""

    def __init__(self, chats: Any, renderer: ChatRenderer, writer: StoreWriter, rows_per_shard: int, tokens_per_batch: int) -> None:
        self.chats, self.renderer, self.writer = chats, renderer, writer
        self.rows_per_shard, self.budget = rows_per_shard, tokens_per_batch
        self.rank, self.world = 0, 1

    def __iter__(self) -> Iterator[Batch]:
        for shard in range(self.rank, self.writer.total, self.world):
            if self.writer.done(shard) is None:
                yield from self._batches(shard)

    def _batches(self, shard: int) -> Iterator[Batch]:
        first = shard * self.rows_per_shard
        chats = self.chats.select(range(first, min(first + self.rows_per_shard, len(self.chats)))).to_list()
        rendered = self.renderer([chat["messages"] for chat in chats])
        groups = by_token_budget([len(r.input_ids) for r in rendered], self.budget)
        for number, rows in enumerate(groups):
            yield Batch(shard, rows, [chats[i] for i in rows], [rendered[i] for i in rows], number + 1 == len(groups))


def by_token_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices sorted by length, cut so that each group's padded size stays within ``budget`` tokens (at least one each)."""
    groups: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[groups[-1][0]] if groups[-1] else 0
        if groups[-1] and longest * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(index)
    return groups


class ExtractionModule(lightning.LightningModule):
    """Runs a causal LM and keeps the distributions at the response positions of every chat."""

    def __init__(
        self, path: str, dtype: str, revision: str | None, trust_remote_code: bool, attn_implementation: str | None,
        device_map: str | None, load_in: str | None, kind: str, top_k: int, top_p: float, draws: int, seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.options: dict[str, Any] = {
            "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code,
            "attn_implementation": attn_implementation, "device_map": device_map, "load_in": load_in,
        }  # fmt: skip
        self.path, self.kind, self.top_k, self.top_p, self.draws, self.seed = path, kind, top_k, top_p, draws, seed
        self.batches: ShardBatches | None = None
        self.held: list[Any] = []  # a list, so that Lightning does not move a model that accelerate has placed

    def check(self, tokenizer: Any, max_length: int) -> None:
        """Loads the model and raises `UserError` where k, vocabulary or context do not fit."""
        model = models.load_model(self.path, **self.options).eval()
        models.check_vocabulary(model, tokenizer, self.path)
        self.vocab_size = len(tokenizer)
        if not 1 <= self.top_k <= self.vocab_size:
            raise UserError(f"extract.top_k={self.top_k}: expected 1 to {self.vocab_size}, the model's vocabulary")
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context and max_length > context:
            raise UserError(f"chat.max_length={max_length} exceeds the context of {self.path} ({context}); set chat.max_length={context}")
        self.held = [model]
        self.head = OutputHead(model)
        if not self.options["device_map"]:
            self.model = model

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Batches of this rank's shards."""
        assert self.batches is not None
        self.batches.rank, self.batches.world = self.trainer.global_rank, self.trainer.world_size
        return DataLoader(self.batches, batch_size=None)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Batches stay on the CPU; `predict_step` moves what the model needs."""
        return batch

    @torch.inference_mode()
    def predict_step(self, batch: Batch) -> list[TopK | None]:
        """Distributions of each chat of the batch at its response positions; None where a logit is not finite."""
        return self._halving(batch.rendered)

    def _halving(self, rendered: Sequence[Rendered]) -> list[TopK | None]:
        """Runs the chats together, or in halves as often as memory runs out."""
        try:
            return self._distributions(rendered)
        except torch.OutOfMemoryError:
            if len(rendered) == 1:
                raise UserError(f"one chat of {len(rendered[0].input_ids)} tokens does not fit in memory; lower chat.max_length") from None
        if self.batches is not None:
            self.batches.budget = max(1, self.batches.budget // 2)
            LOG.warning("out of memory: going on with extract.tokens_per_batch=%d", self.batches.budget)
        torch.cuda.empty_cache()
        half = len(rendered) // 2
        return self._halving(rendered[:half]) + self._halving(rendered[half:])

    def _distributions(self, rendered: Sequence[Rendered]) -> list[TopK | None]:
        device = self.head.head.weight.device
        width = max(1, max(len(r.input_ids) for r in rendered))
        ids = torch.zeros(len(rendered), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, r in enumerate(rendered):
            ids[i, : len(r.input_ids)] = torch.from_numpy(r.input_ids)
            mask[i, : len(r.input_ids)] = 1
        hidden = self.head.hidden(ids.to(device), mask.to(device))
        found = []
        for i, r in enumerate(rendered):
            positions = torch.from_numpy(r.positions).to(device)
            gold = torch.from_numpy(r.input_ids[r.positions + 1]).to(device)
            found.append(self._top(hidden[i, positions], gold, r))
        return found

    def _top(self, hidden: Tensor, gold: Tensor, rendered: Rendered) -> TopK | None:
        wide = self.head.head.weight.shape[0]
        generator = torch.Generator(hidden.device).manual_seed(hash((self.seed, len(rendered.text))) & 0xFFFFFFFF)
        parts: list[TopK] = []
        for chunk in torch.split(hidden, max(1, CHUNK_ELEMENTS // wide)):
            for logits in torch.split(self.head.logits(chunk), max(1, CACHE_ELEMENTS // wide)):
                done = sum(len(p.ids) for p in parts)
                parts.append(self._sparse(logits, gold[done : done + len(logits)], generator))
                if not bool(torch.isfinite(parts[-1].gold_logprob).all()) or bool(parts[-1].logprobs.isnan().any()):
                    return None
        width = max((p.ids.shape[1] for p in parts), default=0)
        ids, logprobs = (
            [torch.nn.functional.pad(t, (0, width - t.shape[1]), value=v) for t in ts]
            for ts, v in (([p.ids for p in parts], 0), ([p.logprobs for p in parts], float("-inf")))
        )
        return TopK(torch.cat(ids).cpu(), torch.cat(logprobs).cpu(), torch.cat([p.gold_logprob for p in parts]).cpu())

    def _sparse(self, logits: Tensor, gold: Tensor, generator: torch.Generator) -> TopK:
        if self.kind == "sampled":
            return sampled_from_logits(logits, gold, self.draws, generator, self.vocab_size)
        if self.kind == "top_p":
            return top_p_from_logits(logits, gold, self.top_p, self.top_k, self.vocab_size)
        return top_k_from_logits(logits, gold, self.top_k, self.vocab_size)


class ShardWriter(BasePredictionWriter):
    """Collects a shard's chats and writes it when it is whole; counts what was dropped and why."""

    def __init__(self, writer: StoreWriter, vocab_size: int, logprobs: str, max_length: int, max_bad_fraction: float, total: int) -> None:
        super().__init__("batch")
        self.writer, self.vocab_size, self.logprobs = writer, vocab_size, logprobs
        self.max_length, self.max_bad, self.total = max_length, max_bad_fraction, total
        self.rows: dict[int, dict[str, Any]] = {}
        self.bad: list[str] = []
        columns = (TextColumn("extract"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        self.progress = Progress(*columns, transient=True)
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

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, batch: Batch, *args: Any) -> None:
        """Keeps the batch's rows; writes the shard with its last batch."""
        for place, chat, rendered, top in zip(batch.rows, batch.chats, batch.rendered, prediction, strict=True):
            self.rows[place] = _row(chat, rendered, top)
            self.tokens += len(rendered.input_ids)
            if top is None:
                self.bad.append(chat["id"])
        if len(self.bad) > self.max_bad * self.total:
            raise UserError(
                f"{len(self.bad)} of {self.total} chats gave NaN or inf (first: {self.bad[0]}), more than extract.max_bad_fraction="
                f"{self.max_bad}; try source.dtype=float32 or bfloat16"
            )
        elapsed = self.progress.tasks[0].elapsed or 1e-9
        self.progress.update(self.task, advance=len(batch.rows), rate=f"{self.tokens / elapsed:,.0f} tokens/s")
        if batch.last:
            rows = [self.rows[i] for i in range(len(self.rows))]
            self.writer.write(batch.shard, _table(rows, self.vocab_size, self.logprobs, self.max_length), _statistics(rows))
            self.rows = {}


def _row(chat: dict[str, Any], rendered: Rendered, top: TopK | None) -> dict[str, Any]:
    kept = top is not None and len(rendered.positions) > 0
    keep = slice(None) if kept else slice(0, 0)
    positions = rendered.positions[keep]
    top = top if top is not None and kept else TopK(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1), torch.zeros(0))
    present = ~top.logprobs.isneginf()
    return {
        "id": chat["id"], "tag": chat["tag"], "text_hash": rendered.text_hash, "input_ids": rendered.input_ids, "positions": positions,
        "boundaries": rendered.boundaries[keep], "counts": present.sum(-1).numpy(), "ids": top.ids[present].numpy(),
        "logprobs": top.logprobs[present].numpy(), "gold_logprob": top.gold_logprob.numpy(),
        "nats": float(-top.gold_logprob.double().sum()), "bytes": rendered.n_bytes if kept else 0, "tokens": len(positions),
        "truncated": rendered.truncated, "bad": not kept and len(rendered.positions) > 0,
    }  # fmt: skip


def _table(rows: list[dict[str, Any]], vocab_size: int, logprobs: str, max_length: int) -> pa.Table:
    def column(key: str, dtype: Any) -> pa.Array:
        return list_column([row[key] for row in rows], dtype)

    ids = id_type(vocab_size)
    return pa.table({
        "id": [row["id"] for row in rows], "tag": [row["tag"] for row in rows], "text_hash": [row["text_hash"] for row in rows],
        "nats": pa.array([row["nats"] for row in rows], pa.float64()), "bytes": pa.array([row["bytes"] for row in rows], pa.int32()),
        "tokens": pa.array([row["tokens"] for row in rows], pa.int32()),
        "input_ids": column("input_ids", ids), "positions": column("positions", np.uint16 if max_length <= 1 << 16 else np.uint32),
        "boundaries": column("boundaries", np.int32), "counts": column("counts", np.uint16), "ids": column("ids", ids),
        "logprobs": list_column([encode_logprobs(row["logprobs"], logprobs) for row in rows], np.dtype(logprobs)),
        "gold_logprob": column("gold_logprob", np.float16),
    })  # fmt: skip


def _statistics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    empty = [row["id"] for row in rows if not len(row["positions"]) and not row["bad"]]
    return {
        "tokens": sum(len(row["input_ids"]) for row in rows), "positions": sum(len(row["positions"]) for row in rows),
        "nats": sum(row["nats"] for row in rows), "text_bytes": sum(row["bytes"] for row in rows),
        "truncated": sum(row["truncated"] for row in rows), "no_response": empty, "bad": [r["id"] for r in rows if r["bad"]],
    }  # fmt: skip


def totals(manifest: dict[str, Any]) -> dict[str, Any]:
    """Sums of the shards' statistics; lists are joined."""
    parts = [entry["statistics"] for entry in manifest["shards"]]
    return {key: sum((p[key] for p in parts), type(value)()) for key, value in parts[0].items()}


def summary(manifest: dict[str, Any], path: Path) -> str:
    """The closing line: chats, tokens, what was dropped, bits per byte of this source, bytes on disk."""
    sums, rows = totals(manifest), sum(entry["rows"] for entry in manifest["shards"])
    size = sum(entry["bytes"] for entry in manifest["shards"])
    bits = sums["nats"] / np.log(2) / max(1, sums["text_bytes"])
    dropped = f"{len(sums['no_response'])} without an assistant token, {len(sums['bad'])} with NaN/inf"
    return (
        f"{manifest['model']}: {rows} chats, {sums['tokens']:,} tokens ({sums['positions']:,} predicted), dropped: {dropped}; "
        f"truncated: {sums['truncated']}; {bits:.4f} bits per byte; {size / 1e6:.1f} MB "
        f"({size / max(1, sums['tokens']):.1f} B/token) in {path}"
    )
