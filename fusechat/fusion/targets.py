"""What the student is trained on at each position: whose distribution, how much of it, and how much of the label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusechat.fusion.batches import FusionBatch
from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.rules import FusionRule, cross_entropy
from fusechat.fusion.shared import Shared


@dataclass(frozen=True)
class Targets:
    """What the student is trained on at N positions. ids, p [N, K]; gold, sft_weight, fusion_weight [N].

    chunk [N], for a loss on chunks of text: neighbours of one number are a chunk, whose weight is at one of them; ids
    are the gold tokens then and p is the chunk's, K = 1. shared, for a loss that is split: the tokens both sides have.
    """

    ids: Tensor
    p: Tensor
    gold: Tensor
    sft_weight: Tensor
    fusion_weight: Tensor
    chunk: Tensor | None = None
    shared: Shared | None = None

    def rows(self, part: slice) -> Targets:
        """The targets of some positions."""
        parts: Iterator[Any] = (None if each is None else each[part] for each in vars(self).values())
        return Targets(*parts)


def targets_of(batch: FusionBatch, rule: FusionRule, loss: FusionLoss, progress: float) -> tuple[Targets, Tensor]:
    """What the rule makes of a batch's distributions; and each model's part in every position, [N, S].

    progress: share of the training that is done. λ is 1 where there is nothing to fuse.
    """
    first = 0 if rule.include_pivot else 1
    p, ids = loss.teacher(batch.logprobs), batch.ids.long()
    own, common = (batch.nats, batch.n_tokens), (batch.common_nats, batch.common_bytes)
    ce = cross_entropy(*(common if rule.metric == "bits_per_byte" else own))[:, first:]
    fused = rule(ids[first:], p[first:], batch.gold_logprob[first:], ce, batch.sequence, (ids[0], p[0]))
    lam = loss.sft_share(progress, fused.reward)[batch.sequence]
    per_token = 1.0 / batch.step_tokens.clamp_min(1)
    speaker = fused.weight.argmax(1) + first
    if loss.on_chunks and batch.chunk.shape[1]:  # of one's own chats nobody has said anything
        at = speaker, torch.arange(len(batch.gold), device=lam.device)
        p = torch.exp(-batch.chunk_nats[at] / loss.temperature) * fused.weight.amax(1)
        return _of_chunks(batch.gold, p, batch.chunk[at], batch.sequence, lam, per_token), fused.weight
    lam = lam.masked_fill(~(fused.p > 0).any(-1), 1.0)
    shared = Shared(batch.shared, speaker) if loss.split else None
    weights = lam * per_token, (1 - lam) * per_token
    return Targets(fused.ids, fused.p, batch.gold, *weights, shared=shared), fused.weight


def _of_chunks(gold: Tensor, p: Tensor, chunk: Tensor, sequence: Tensor, lam: Tensor, per_token: Tensor) -> Targets:
    """Targets on chunks of text, whose weight is at their last position; λ is 1 where p, the chunk's, is 0. All [N]."""
    changes = (chunk.diff() != 0) | (sequence.diff() != 0)
    number, last = torch.cat([changes.new_zeros(1), changes]).cumsum(0), torch.cat([changes, changes.new_ones(1)])
    lam = torch.where(p > 0, lam, 1.0)
    weights = lam * per_token, (1 - lam) * per_token * last
    return Targets(gold.unsqueeze(1), p.unsqueeze(1), gold, *weights, number)
