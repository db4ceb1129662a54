"""Extraction as Lightning runs it: shards of chats -> batches by token budget -> distributions -> Arrow shards."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fusechat.app.errors import UserError
from fusechat.chats.render import ChatRenderer, Rendered
from fusechat.models import load as models
from fusechat.models.heads import OutputHead
from fusechat.stores.distributions import TopK, sampled_from_logits, top_k_from_logits, top_p_from_logits
from fusechat.stores.store import StoreWriter

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

    def __init__(
        self, chats: Any, renderer: ChatRenderer, writer: StoreWriter, rows_per_shard: int, tokens_per_batch: int
    ) -> None:
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
        self,
        path: str,
        dtype: str,
        revision: str | None,
        trust_remote_code: bool,
        attn_implementation: str | None,
        device_map: str | None,
        load_in: str | None,
        kind: str,
        top_k: int,
        top_p: float,
        draws: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "dtype": dtype,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "attn_implementation": attn_implementation,
            "device_map": device_map,
            "load_in": load_in,
        }
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
            raise UserError(
                f"chat.max_length={max_length} exceeds the context of {self.path} ({context}); set chat.max_length={context}"
            )
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
                raise UserError(
                    f"one chat of {len(rendered[0].input_ids)} tokens does not fit in memory; lower chat.max_length"
                ) from None
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
