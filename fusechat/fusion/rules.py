"""Fusion rules: several models' distributions at the same positions -> one.

A rule is one function here, or in a module of one's own, and one file in ``conf/fusion``.
Shapes: S models (the pivot first where it takes part), B sequences, N positions, K kept entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusechat.app import settings
from fusechat.app.errors import UserError
from fusechat.app.registry import Family
from fusechat.stores.distributions import merge_duplicates

RULES = Family("fusion.rule", needs=("sources", "one", "own"))
"""Each model's cross entropy at every position [N, S] -> its weight there [N, S].

Needs: ``sources``: there is something to fuse; without it training is plain SFT (λ = 1). ``one``: weights are one-hot,
and the distribution of one model is taken as it is rather than a mixture of all; where they are all 0, there is
nothing to fuse (λ = 1 there). ``own``: the first model is the student itself, with whom the others are compared.
"""


MIN_CE = "the model of lowest cross entropy speaks for the sequence (published)"


@RULES.register("min_ce", MIN_CE, needs=("sources", "one"))
def min_ce(ce: Tensor) -> Tensor:
    """w_s = 1 for s = argmin CE; ties go to the first model (FuseLLM, arXiv 2401.10491)."""
    return torch.nn.functional.one_hot(ce.argmin(-1), ce.shape[1])


@RULES.register("avg_ce", "the mean of all models, weighted by softmax over exp(-CE)", needs=("sources",))
def avg_ce(ce: Tensor) -> Tensor:
    """w = softmax_s(exp(-CE_s)) (FuseLLM). The unit of CE matters: see `cross_entropy`."""
    return torch.softmax(torch.exp(-ce), -1)


DUAL_MIN_CE = "the best of the others, where it beats the model itself; else nothing is fused (FedMKT)"


@RULES.register("dual_min_ce", DUAL_MIN_CE, needs=("sources", "one", "own"))
def dual_min_ce(ce: Tensor) -> Tensor:
    """w_k = 1 for k = argmin_{s > 0} CE_s where CE_k < CE_0, the model's own; else all 0 (FedMKT, arXiv 2406.02224).

    DualMinCE: S_i = {x : CE_{k*}(x) < CE_i(x)} is what model i learns from others, and everything else from its labels.
    """
    own, others = ce[:, :1], ce[:, 1:]
    best = torch.nn.functional.one_hot(others.argmin(-1) + 1, ce.shape[1])
    return best * (others.amin(-1, keepdim=True) < own)


@RULES.register("sft", "the baseline; the same code and steps with lambda = 1 and no source", needs=("one",))
def sft(ce: Tensor) -> Tensor:
    """The first model, the pivot, stands in every record; nothing is learnt from its distributions."""
    return torch.nn.functional.one_hot(torch.zeros_like(ce[:, 0], dtype=torch.long), ce.shape[1])


@dataclass(frozen=True)
class Fused:
    """ids, p [N, K']; weight [N, S], each model's part in a position; reward [B], exp(-CE) of what was chosen."""

    ids: Tensor
    p: Tensor
    weight: Tensor
    reward: Tensor


@dataclass(frozen=True)
class FusionRule:
    """Whose distribution the student learns from.

    rule: a name of `RULES`. level: compare whole sequences (published) or single tokens. metric: what cross entropy is
    taken over, see `cross_entropy`: ``bits_per_byte``, the text that all models predict, or ``nats_per_token``, each
    model's own tokens (as released). include_pivot: the pivot's own distribution takes part (published). empty: where
    the chosen model has no distribution at a position, take the ``pivot``'s (as released), or ``skip`` its fusion loss.
    Raises `UserError` for unknown names.
    """

    rule: str = "min_ce"
    level: str = "sequence"
    metric: str = "bits_per_byte"
    empty: str = "skip"
    include_pivot: bool = True

    def __post_init__(self) -> None:
        RULES[self.rule]
        settings.check("fusion", **vars(self))
        if "own" in RULES[self.rule].needs and not self.include_pivot:
            raise UserError(f"fusion={self.rule} compares with the pivot itself; set fusion.include_pivot=true")

    @property
    def needs_sources(self) -> bool:
        """Whether there is anything to fuse; plain SFT has no source."""
        return "sources" in RULES[self.rule].needs

    @property
    def takes_one(self) -> bool:
        """Whether one model speaks at a position, rather than a mixture of all."""
        return "one" in RULES[self.rule].needs

    def __call__(
        self, ids: Tensor, p: Tensor, gold_logprob: Tensor, ce: Tensor, sequence: Tensor, pivot: tuple[Tensor, Tensor]
    ) -> Fused:
        """ids, p [S, N, K]; gold_logprob [S, N]; ce [B, S]; sequence [N]; pivot: ids, p [N, K] for empty positions."""
        weight = self.weights(gold_logprob, ce, sequence, present=(p > 0).any(-1).T)
        if self.takes_one:
            chosen, positions = weight.argmax(1), torch.arange(len(weight), device=weight.device)
            out_ids, out = ids[chosen, positions], p[chosen, positions] * weight.amax(1, keepdim=True)
            reward = torch.exp(-ce).amax(1)
        else:
            mixed = (p * weight.T.unsqueeze(-1)).permute(1, 0, 2).flatten(1)
            out_ids, out = merge_duplicates(ids.permute(1, 0, 2).flatten(1), mixed)
            reward = torch.exp(-ce).mean(1)
        if self.empty == "pivot":
            lacking = ~(out > 0).any(-1, keepdim=True)
            out_ids = torch.where(lacking, _widened(pivot[0], out.shape[1]), out_ids)
            out = torch.where(lacking, _widened(pivot[1], out.shape[1]), out)
        return Fused(out_ids, out, weight, reward)

    def weights(self, gold_logprob: Tensor, ce: Tensor, sequence: Tensor, present: Tensor) -> Tensor:
        """Each model's part in every position, [N, S]; ``present`` [N, S] says who has a distribution there."""
        per_position = ce[sequence]
        if self.level == "token":  # -log p(gold): nats of one token, infinite where a model is silent
            per_position = (-gold_logprob.T).masked_fill(~present, float("inf"))
        weight: Tensor = RULES[self.rule].function(per_position)
        if self.takes_one:
            return weight.to(ce.dtype)
        weight = weight * present if self.empty == "skip" else weight
        return weight / weight.sum(-1, keepdim=True).clamp_min(1e-12)


def cross_entropy(nats: Tensor, length: Tensor) -> Tensor:
    """CE = nats / length; a text of no length counts as infinite. Elementwise.

    ``bits_per_byte``: of the text that all models predict, in nats per UTF-8 byte, log 2 times the bits. MinCE's choice
    is the same in either unit; exp(-CE), hence AvgCE's weights and the reward, is not: it is of nats.
    ``nats_per_token``: of what each model predicts, per own token.
    """
    return torch.where(length > 0, nats / length.clamp_min(1), float("inf"))


def _widened(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))
