"""Kinds of extraction: what is kept of each next-token distribution. N positions, V vocabulary, K kept entries.

A kind is a function ``(logits [N, V], gold [N], keep, generator) -> TopK``, computed in fp32. gold: ids of the tokens
that come next; their log-probabilities are always kept. generator: for kinds that draw (needs ``generator``), seeded
by the chat's content, so that neither batches nor other chats decide what is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusechat.app.registry import Family
from fusechat.stores.distributions import NEG_INF, TopK, merge_duplicates

KINDS = Family("extract.kind", needs=("generator",))


@dataclass(frozen=True)
class Keep:
    """How much is kept. vocab_size: ids from there on are padding of the embedding and are never kept."""

    vocab_size: int
    top_k: int = 10
    top_p: float = 0.99
    draws: int = 50


@KINDS.register("top_k", "the top_k most likely tokens (published)")
def top_k(logits: Tensor, gold: Tensor, keep: Keep, generator: torch.Generator | None = None) -> TopK:
    """K = top_k largest entries of softmax(logits). What padded ids and all other tokens hold is tail mass."""
    logprobs = logits.float().log_softmax(-1)
    values, ids = largest(logprobs[:, : keep.vocab_size], keep.top_k)
    return TopK(ids, values, _at(logprobs, gold))


@KINDS.register("top_p", "the fewest most likely tokens that hold the mass top_p, at most top_k of them")
def top_p(logits: Tensor, gold: Tensor, keep: Keep, generator: torch.Generator | None = None) -> TopK:
    """Entry i of the sorted top_k is kept while p_1 + … + p_(i-1) < top_p."""
    return _nucleus(top_k(logits, gold, keep), keep)


@KINDS.register(
    "sampled", "random sampling, unbiased (arXiv 2503.16870): draws tokens per position", needs=("generator",)
)
def sampled(logits: Tensor, gold: Tensor, keep: Keep, generator: torch.Generator | None = None) -> TopK:
    """``draws`` samples of softmax(logits): distinct tokens with their shares of the draws, K = draws at most.

    A share is an unbiased estimate of the token's probability; shares sum to one, so there is no tail.
    """
    logprobs = logits[:, : keep.vocab_size].float().log_softmax(-1)
    probs = logprobs.exp().nan_to_num(1.0)  # rows of NaN are dropped for their gold log-probability, not drawn from
    drawn = torch.multinomial(probs, keep.draws, replacement=True, generator=generator)
    ids, shares = merge_duplicates(drawn, torch.full(drawn.shape, 1.0 / keep.draws, device=drawn.device))
    order = shares.argsort(dim=-1, descending=True, stable=True)  # spare entries last: what is absent is -inf
    return TopK(ids.gather(-1, order), shares.gather(-1, order).log(), _at(logprobs, gold))


def _nucleus(top: TopK, keep: Keep) -> TopK:
    probs = top.logprobs.exp()
    mass_before = probs.cumsum(-1) - probs
    return TopK(top.ids, top.logprobs.masked_fill(mass_before >= keep.top_p, NEG_INF), top.gold_logprob)


OF_TOP: dict[str, Callable[[TopK, Keep], TopK]] = {  # kinds that the top_k entries, falling, are enough for
    "top_k": lambda top, keep: top,
    "top_p": _nucleus,
}


def entries_of(kind: str, keep: Keep) -> int:
    """About how many entries are kept at a position.

    A store has about so many bytes for each byte of the chats: four of these are a token, two tokens of three are the
    assistant's, and an entry has six bytes.
    """
    return keep.draws if "generator" in KINDS[kind].needs else keep.top_k


def largest(values: Tensor, k: int, block: int = 64) -> tuple[Tensor, Tensor]:
    """`torch.topk` along the last dimension, several times faster on wide rows. values [N, V] -> values, ids [N, k].

    The k largest lie in the k blocks of largest maxima: only k * block candidates are sorted.
    """
    n, v = values.shape
    if v < 2 * k * block:
        return values.topk(k, dim=-1)
    whole = v - v % block  # the last, incomplete block is always a candidate
    blocks = torch.unflatten(values[:, :whole], 1, (-1, block))
    best = blocks.amax(-1).topk(k, dim=-1).indices
    candidates = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, block)).flatten(1)
    ids = (best.unsqueeze(-1) * block + torch.arange(block, device=values.device)).flatten(1)
    rest = torch.arange(whole, v, device=values.device).expand(n, -1)
    candidates, ids = torch.cat([candidates, values[:, whole:]], 1), torch.cat([ids, rest], 1)
    top = candidates.topk(k, dim=-1)
    return top.values, ids.gather(1, top.indices)


def joined(parts: Sequence[TopK], counts: Sequence[int]) -> list[TopK | None]:
    """Successive parts -> chat by chat, ``counts`` positions each, on the CPU; None where a chat has NaN or inf."""
    ids, logprobs = torch.cat([p.ids for p in parts]), torch.cat([p.logprobs for p in parts])
    gold = torch.cat([p.gold_logprob for p in parts])
    sound = torch.isfinite(gold) & ~logprobs.isnan().any(-1)
    columns = (torch.split(part.cpu(), list(counts)) for part in (sound, ids, logprobs, gold))
    chats = zip(*columns, strict=True)
    return [TopK(*kept) if bool(fine.all()) else None for fine, *kept in chats]


def generator_for(text: str, seed: int, device: torch.device) -> torch.Generator:
    """A generator of its own for each text: seeded by a hash of seed and text, the same in every process."""
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def _at(logprobs: Tensor, ids: Tensor) -> Tensor:
    return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
