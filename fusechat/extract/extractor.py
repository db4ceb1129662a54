"""What the device does: rendered chats -> sparse distributions at their response positions."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.chats.padding import pad
from fusechat.chats.render import Rendered
from fusechat.extract.batches import Batch, by_token_budget
from fusechat.extract.kinds import KINDS, Keep, generator_for, joined
from fusechat.models.devices import fed_at
from fusechat.models.heads import OutputHead, chunk_rows
from fusechat.stores.distributions import TopK

LOG = logging.getLogger(__name__)
ON_CPU = 1 << 24, 1 << 21  # elements of the logits computed at a time, and of these sorted at a time: 8 MiB in fp32


class Extractor:
    """Runs a causal LM, and its head only where a position is stored. The device is waited for once a batch.

    D hidden size, N response positions of all chats of a batch, V rows of the lm_head.
    budget: padded tokens of a batch. unfit: those of every batch that did not fit in memory since this was last told.
    """

    def __init__(self, model: Any, kind: str, keep: Keep, *, seed: int = 0, budget: int = 16384) -> None:
        self.head = OutputHead(model)
        self.kind, self.keep, self.seed = KINDS[kind], keep, seed
        self.device, self.budget = fed_at(model), budget
        self.unfit: list[int] = []

    def batches(self, rendered: Sequence[Rendered]) -> Iterator[Batch]:
        """All chats of a shard, batch by batch; nothing outside the shard decides them."""
        for places in by_token_budget([len(r.input_ids) for r in rendered], self.budget):
            yield places, self([rendered[i] for i in places])

    def noted(self) -> dict[str, Any]:
        """What there is to say of the shard that was made."""
        found, self.unfit = self.unfit, []
        return {"out_of_memory": found}

    @torch.inference_mode()
    def __call__(self, rendered: Sequence[Rendered]) -> list[TopK | None]:
        """Distributions of each chat at its response positions; None where a logit is not finite.

        Where memory runs out this batch goes on in halves, and the next one is tried whole again. Raises `UserError`
        where one chat alone does not fit.
        """
        longest = max(len(r.input_ids) for r in rendered)
        try:
            return self._distributions(rendered)
        except torch.OutOfMemoryError:
            if len(rendered) == 1:
                raise UserError(
                    f"one chat of {longest} tokens does not fit in memory; lower chat.max_length, or spread or "
                    "quantize the model with source.device_map=auto or source.load_in=8bit"
                ) from None
        tokens = longest * len(rendered)
        if not self.unfit:
            LOG.warning("out of memory at %d tokens: they run in halves; extract.tokens_per_batch is too high", tokens)
        self.unfit.append(tokens)
        torch.cuda.empty_cache()
        half = len(rendered) // 2
        return self(rendered[:half]) + self(rendered[half:])

    def _distributions(self, rendered: Sequence[Rendered]) -> list[TopK | None]:
        counts = [len(r.positions) for r in rendered]
        ids, mask = pad([r.input_ids for r in rendered])
        hidden = self.head.hidden(ids.to(self.device), mask.to(self.device))
        row = np.repeat(np.arange(len(rendered)), counts)
        at = np.concatenate([r.positions for r in rendered])
        next_token = np.concatenate([r.input_ids[r.positions + 1] for r in rendered])
        rows, positions, gold = (torch.from_numpy(part).to(hidden.device) for part in (row, at, next_token))
        stored = hidden[rows, positions]
        del hidden
        if not self.kind.needs:
            return joined(list(self._sparse(stored, gold, None)), counts)
        parts: list[TopK] = []
        for r, one, its_gold in zip(rendered, torch.split(stored, counts), torch.split(gold, counts), strict=True):
            parts += self._sparse(one, its_gold, generator_for(r.text, self.seed, stored.device))
        return joined(parts, counts)

    def _sparse(self, stored: Tensor, gold: Tensor, generator: torch.Generator | None) -> Iterator[TopK]:
        """Hidden states [N, D], gold [N] -> what the kind keeps, piece by piece. Nothing here waits for the device."""
        wide = self.head.projection.weight.shape[0]
        at_once, sorted_at_once = (chunk_rows(stored.device, wide, elements) for elements in ON_CPU)
        done = 0
        for chunk in torch.split(stored, at_once):
            for logits in torch.split(self.head.logits(chunk), sorted_at_once):
                theirs = gold[done : done + len(logits)].to(logits.device)
                yield self.kind.function(logits, theirs, self.keep, generator)
                done += len(logits)
