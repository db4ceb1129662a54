"""Fusion rules: several models' distributions at the same positions -> one.

Shapes: S models (the pivot first where it takes part), B sequences, N positions, K kept entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusechat.app.errors import one_of
from fusechat.stores.distributions import merge_duplicates

RULES, LEVELS, METRICS, EMPTY = (
    ("min_ce", "avg_ce"),
    ("sequence", "token"),
    ("bits_per_byte", "nats_per_token"),
    ("skip", "pivot"),
)


@dataclass(frozen=True)
class Fused:
    """ids, p [N, K']; weight [N, S], each model's part in a position; reward [B], exp(-CE) of what was chosen."""

    ids: Tensor
    p: Tensor
    weight: Tensor
    reward: Tensor


@dataclass(frozen=True)
class FusionRule:
    """MinCE takes the model of lowest cross entropy, AvgCE the mean of all, weighted by softmax(exp(-CE)) (FuseLLM).

    level: compare whole sequences (published) or single tokens. metric: bits per byte of the response, fit for comparing
    tokenizers, or nats per token (as released). empty: where the chosen model has no distribution at a position, take the
    pivot's (as released) or leave the position without fusion loss. Ties go to the first model.
    """

    name: str = "min_ce"
    level: str = "sequence"
    metric: str = "bits_per_byte"
    empty: str = "skip"

    def __post_init__(self) -> None:
        one_of(self.name, RULES, "fusion.rule")
        one_of(self.level, LEVELS, "fusion.level")
        one_of(self.metric, METRICS, "fusion.metric")
        one_of(self.empty, EMPTY, "fusion.empty")

    def __call__(
        self, ids: Tensor, p: Tensor, gold_logprob: Tensor, ce: Tensor, sequence: Tensor, pivot: tuple[Tensor, Tensor]
    ) -> Fused:
        """ids, p [S, N, K]; gold_logprob [S, N]; ce [B, S]; sequence [N]; pivot: its ids, p [N, K], for empty positions."""
        weight = self.weights(gold_logprob, ce, sequence, present=(p > 0).any(-1).T)
        if self.name == "avg_ce":
            mixed = (p * weight.T.unsqueeze(-1)).permute(1, 0, 2).flatten(1)
            out_ids, out = merge_duplicates(ids.permute(1, 0, 2).flatten(1), mixed)
            reward = torch.exp(-ce).mean(1)
        else:
            chosen = weight.argmax(1)
            positions = torch.arange(len(chosen), device=chosen.device)
            out_ids, out = ids[chosen, positions], p[chosen, positions]
            reward = torch.exp(-ce).amax(1)
        if self.empty == "pivot":
            lacking = ~(out > 0).any(-1, keepdim=True)
            width = out.shape[1]
            out_ids = torch.where(lacking, _widened(pivot[0], width), out_ids)
            out = torch.where(lacking, _widened(pivot[1], width), out)
        return Fused(out_ids, out, weight, reward)

    def weights(self, gold_logprob: Tensor, ce: Tensor, sequence: Tensor, present: Tensor) -> Tensor:
        """Each model's part in every position, [N, S]; ``present`` [N, S] says who has a distribution there."""
        each = -gold_logprob.T if self.level == "token" else ce[sequence]
        if self.level == "token":
            each = each.masked_fill(~present, float("inf"))
        if self.name == "avg_ce":
            part = torch.softmax(torch.exp(-each), -1)
            part = part * present if self.empty == "skip" else part
            return part / part.sum(-1, keepdim=True).clamp_min(1e-12)
        return torch.nn.functional.one_hot(each.argmin(-1), each.shape[1]).to(ce.dtype)


def cross_entropy(nats: Tensor, n_bytes: Tensor, n_tokens: Tensor, metric: str) -> Tensor:
    """Cross entropies in nats per byte of text or per own token, elementwise; texts of no length count as infinite."""
    unit = n_bytes if metric == "bits_per_byte" else n_tokens
    return torch.where(unit > 0, nats / unit.clamp_min(1), float("inf"))


def _widened(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))
