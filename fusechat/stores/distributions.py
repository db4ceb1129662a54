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


def top_k_from_logits(logits: Tensor, gold: Tensor, k: int, vocab_size: int | None = None) -> TopK:
    """The k most likely entries of softmax(logits), in fp32. logits [N, V], gold [N].

    vocab_size: ids from there on are padding of the embedding; they are never kept, their mass is tail mass.
    """
    logprobs = logits.float().log_softmax(-1)
    values, ids = largest(logprobs[:, :vocab_size], k)
    return TopK(ids, values, logprobs.gather(-1, gold.unsqueeze(-1)).squeeze(-1))


def largest(values: Tensor, k: int, block: int = 64) -> tuple[Tensor, Tensor]:
    """`torch.topk` along the last dimension, several times faster on wide rows.

    The k largest lie in the k blocks of largest maxima, so that only k * block candidates are sorted.
    """
    n, v = values.shape
    whole = v - v % block
    if v < 2 * k * block:
        return values.topk(k, dim=-1)
    blocks = torch.unflatten(values[:, :whole], 1, (-1, block))
    best = blocks.amax(-1).topk(k, dim=-1).indices
    candidates = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, block)).flatten(1)
    ids = (best.unsqueeze(-1) * block + torch.arange(block, device=values.device)).flatten(1)
    rest = torch.arange(whole, v, device=values.device).expand(n, -1)
    candidates, ids = torch.cat([candidates, values[:, whole:]], 1), torch.cat([ids, rest], 1)
    top = candidates.topk(k, dim=-1)
    return top.values, ids.gather(1, top.indices)


def top_p_from_logits(logits: Tensor, gold: Tensor, p: float, k: int, vocab_size: int | None = None) -> TopK:
    """The fewest most likely entries that hold mass ``p``, at most k of them."""
    top = top_k_from_logits(logits, gold, k, vocab_size)
    mass_before = top.logprobs.exp().cumsum(-1) - top.logprobs.exp()
    return TopK(top.ids, top.logprobs.masked_fill(mass_before >= p, NEG_INF), top.gold_logprob)


def sampled_from_logits(
    logits: Tensor, gold: Tensor, draws: int, generator: torch.Generator, vocab_size: int | None = None
) -> TopK:
    """Random-sampling distillation (arXiv 2503.16870): ``draws`` samples from the distribution itself.

    Each distinct token is kept with its share of the draws, an unbiased estimate of its probability;
    the entries sum to one, so there is no tail. K is the largest number of distinct tokens.
    """
    logprobs = logits[:, :vocab_size].float().log_softmax(-1)
    drawn = torch.multinomial(logprobs.exp(), draws, replacement=True, generator=generator)
    weight = torch.full(drawn.shape, 1.0 / draws, device=drawn.device)
    ids, shares = merge_duplicates(drawn, weight)
    order = shares.argsort(dim=-1, descending=True, stable=True)
    ids, shares = ids.gather(-1, order), shares.gather(-1, order)
    width = int((shares > 0).sum(-1).max()) if len(shares) else 1
    gold_logprob = logprobs.gather(-1, gold.unsqueeze(-1)).squeeze(-1)
    return TopK(ids[:, :width], shares[:, :width].log(), gold_logprob)


def merge_duplicates(ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the probabilities of equal ids within a row. ids, probs [N, K] -> the same shapes; spare entries hold 0."""
    ids, order = ids.sort(dim=-1, stable=True)
    probs = probs.gather(-1, order)
    segment = torch.zeros_like(ids)
    segment[:, 1:] = (ids[:, 1:] != ids[:, :-1]).cumsum(-1)
    merged_ids = torch.zeros_like(ids).scatter_(-1, segment, ids)
    return merged_ids, torch.zeros_like(probs).scatter_add_(-1, segment, probs)
