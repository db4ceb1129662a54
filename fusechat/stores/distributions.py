"""The thing that flows: next-token distributions, kept sparse from extraction to the loss.

Shapes: N positions, K kept entries, V vocabulary. Position t holds the distribution of the token after t.
Values are log-probabilities, not logits, so that the tail mass 1 - sum(p) is never lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEG_INF = float("-inf")


@dataclass(frozen=True)
class TopK:
    """Sparse distributions: ids, logprobs [N, K] (absent entries: id 0, logprob -inf), gold_logprob [N]."""

    ids: Tensor
    logprobs: Tensor
    gold_logprob: Tensor


NOTHING = TopK(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1), torch.zeros(0))  # of a chat without a position


def merge_duplicates(ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the probabilities of equal ids within a row. ids, probs [N, K] -> the same shapes; spare entries hold 0."""
    ids, order = ids.sort(dim=-1, stable=True)
    probs = probs.gather(-1, order)
    segment = torch.zeros_like(ids)
    segment[:, 1:] = (ids[:, 1:] != ids[:, :-1]).cumsum(-1)
    merged_ids = torch.zeros_like(ids).scatter_(-1, segment, ids)
    return merged_ids, torch.zeros_like(probs).scatter_add_(-1, segment, probs)
