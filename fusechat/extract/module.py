"""Extraction as Lightning runs it: batches of rendered chats -> sparse distributions at the response positions."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import lightning
import torch
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.chats.padding import pad
from fusechat.chats.render import Rendered
from fusechat.extract.batches import Batch, ShardBatches
from fusechat.extract.kinds import KINDS, Keep, generator_for, joined
from fusechat.models.heads import OutputHead
from fusechat.stores.distributions import TopK

LOG = logging.getLogger(__name__)
CHUNK_ELEMENTS = 1 << 24  # logits computed at a time: 64 MiB in fp32
CACHE_ELEMENTS = 1 << 21  # logits normalised and sorted at a time: 8 MiB stay in the cache


class ExtractionModule(lightning.LightningModule):
    """Runs a causal LM over ``batches`` and keeps the distributions at the response positions of every chat.

    placed: accelerate has put the model where it belongs, and Lightning must not move it.
    D hidden size, T tokens, R response positions of a chat, V rows of the lm_head.
    """

    def __init__(
        self, model: Any, batches: ShardBatches, kind: str, keep: Keep, *, seed: int = 0, placed: bool = False
    ) -> None:
        super().__init__()
        self.batches, self.kind, self.keep, self.seed = batches, KINDS[kind].function, keep, seed
        self.head = OutputHead(model)  # no nn.Module: it holds the model without registering it
        if not placed:
            self.model = model

    def predict_dataloader(self) -> Iterator[Batch]:
        """Batches of this rank's shards."""
        return self.batches.of_rank(self.trainer.global_rank, self.trainer.world_size)

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
        LOG.warning("out of memory: going on with extract.tokens_per_batch=%d", self.batches.halve())
        torch.cuda.empty_cache()
        half = len(rendered) // 2
        return self._halving(rendered[:half]) + self._halving(rendered[half:])

    def _distributions(self, rendered: Sequence[Rendered]) -> list[TopK | None]:
        device = self.head.projection.weight.device
        ids, mask = pad([r.input_ids for r in rendered])
        hidden = self.head.hidden(ids.to(device), mask.to(device))
        found = []
        for i, r in enumerate(rendered):
            positions = torch.from_numpy(r.positions).to(device)
            gold = torch.from_numpy(r.input_ids[r.positions + 1]).to(device)
            found.append(self._sparse(hidden[i, positions], gold, generator_for(r.text, self.seed, device)))
        return found

    def _sparse(self, hidden: Tensor, gold: Tensor, generator: torch.Generator) -> TopK | None:
        """hidden [R, D], gold [R] -> what the kind keeps of each position; None where a logit is not finite."""
        parts: list[TopK] = []
        done = 0
        for logits in self._logits(hidden):
            part = self.kind(logits, gold[done : done + len(logits)], self.keep, generator)
            if not bool(torch.isfinite(part.gold_logprob).all()) or bool(part.logprobs.isnan().any()):
                return None
            parts.append(part)
            done += len(logits)
        return joined(parts)

    def _logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """hidden [R, D] -> logits [r, V] of successive positions, multiplied in chunks and given in smaller pieces."""
        wide = self.head.projection.weight.shape[0]
        for chunk in torch.split(hidden, max(1, CHUNK_ELEMENTS // wide)):
            yield from torch.split(self.head.logits(chunk), max(1, CACHE_ELEMENTS // wide))
