"""The fusion loss on sparse targets: a divergence between the teacher's p and the student's q, and its settings.

A divergence is one function here, or in a module of one's own, and one file in ``conf/loss``.
Shapes: N positions, K kept entries, B sequences. Spare entries have id 0 and p = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from fusechat.app import settings
from fusechat.app.errors import UserError
from fusechat.app.registry import Family
from fusechat.app.schema.values import MissingMass

LOSSES = Family("loss.kind", needs=("ranked", "conditional", "rest", "kept", "chunks", "split"))
"""D(p, log p, log q), each [N, K], -> [N]; differentiable in log q. Spare entries have p = q = 0 and finite logarithms.

Needs: ``ranked``: entries are compared by rank, largest first, and ids do not count. ``conditional`` and ``rest`` speak
of ``missing_mass=renormalize``, where p has no mass on other tokens: q is renormalised over the kept ids too; all other
tokens are one more outcome, of p = 0. ``kept``: the kept entries alone are compared, the missing mass is not.
``chunks``: p and q are the probabilities of a chunk of text, that of all its tokens, K = 1; neither ids nor missing
mass count. ``split``: K entries are compared by id, then K by rank among the tokens that only one side has; a last one,
where missing_mass=tail, is all other tokens (`fusechat.fusion.shared`).
"""
MISSING = get_args(MissingMass)
TINY = 1e-12  # the least probability of all other tokens together
SMALLEST = 1.2e-38  # the least normal number in fp32
EDGE = 1e-6  # by which a chunk's log-probability is kept from 0
ABSENT = -1e4  # log-probability of a spare entry: exp(ABSENT) = 0 and 0 * ABSENT = 0, where 0 * -inf were NaN


@LOSSES.register("ce", "cross entropy, -sum p log q (published)")
def ce(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """H(p, q) = -Σ_k p_k log q_k."""
    return -(p * log_q).sum(-1)


@LOSSES.register("forward_kl", "KL(p || q): the cross entropy less the teacher's entropy")
def forward_kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) = -Σ_k p_k log q_k + Σ_k p_k log p_k."""
    return -(p * log_q).sum(-1) + (p * log_p).sum(-1)


@LOSSES.register("reverse_kl", "KL(q || p), which seeks the teacher's modes", needs=("conditional",))
def reverse_kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q ‖ p) = Σ_k q_k (log q_k - log p_k); it would be infinite if q had mass where p has none."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


@LOSSES.register("jsd", "Jensen-Shannon divergence, symmetric and at most log 2", needs=("rest",))
def jsd(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q)."""
    q = log_q.exp()
    log_m = ((p + q) / 2).clamp_min(SMALLEST).log()
    return ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2


@LOSSES.register("uld", "distance of the sorted probabilities; needs no vocabulary map", needs=("ranked",))
def uld(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ_k |p_(k) - q_(k)|, each sorted (arXiv 2402.12030); entries that the teacher lacks count as zero."""
    return (p - log_q.exp()).abs().sum(-1)


@LOSSES.register(
    "standardized_uld", "distance of the sorted, standardized logits of the kept", needs=("ranked", "kept")
)
def standardized_uld(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ_k |z'_(k) - y'_(k)|, x' = (x - mean x) / std x over the kept logits (InfiFusion, arXiv 2501.02795).

    Log-probabilities standardize as logits do: their common shift goes.
    """
    kept = p > 0
    return ((_standardized(log_p, kept) - _standardized(log_q, kept)) * kept).abs().sum(-1)


def _standardized(x: Tensor, kept: Tensor) -> Tensor:
    count = kept.sum(-1, keepdim=True).clamp_min(1)
    centred = x - torch.where(kept, x, 0.0).sum(-1, keepdim=True) / count
    variance = torch.where(kept, centred, 0.0).square().sum(-1, keepdim=True) / count
    return centred / variance.clamp_min(TINY).sqrt()


@LOSSES.register("hybrid", "KL on the tokens both sides have, sorted distance on the rest (GOLD)", needs=("split",))
def hybrid(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ_{k common} p_k log(p_k / q_k) + Σ_r |p_(r) - q_(r)| over the rest: GOLD at β 0 and weights 1, NeMo-RL's gold.

    Neither part is renormalised: p and q are probabilities in the whole of their vocabularies.
    """
    k = p.shape[-1] // 2
    terms, distance = p * (log_p - log_q), (p - log_q.exp())[..., k : 2 * k].abs()
    return terms[..., :k].sum(-1) + terms[..., 2 * k :].sum(-1) + distance.sum(-1)


@LOSSES.register("alm", "likelihood of the chunks of text that both sides cut alike (ALM)", needs=("chunks",))
def alm(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """-p' log q' - (1 - p') log(1 - q'), binary cross entropy of a chunk's p and q (arXiv 2503.20083), x' = e^-EDGE x.

    ``loss.temperature`` τ has made them p^(1/τ) and q^(1/τ) before.
    """
    a, b = log_p - EDGE, log_q - EDGE
    otherwise = torch.where(b > -0.7, (-torch.expm1(b)).log(), torch.log1p(-b.clamp_max(-0.7).exp()))
    return -(a.exp() * b - torch.expm1(a) * otherwise).sum(-1)


@dataclass(frozen=True)
class FusionLoss:
    """L = λ L_SFT + (1 - λ) D(p, q): which divergence D, which temperatures, which λ, and the mass not kept.

    kind: a name of `LOSSES`. missing_mass: ``renormalize`` p to sum to one (published); ``tail``: one more outcome
    stands for all other tokens, in p and in q; ``zero``: other tokens contribute nothing. temperature sharpens or
    flattens the teacher alone, as released; student_temperature the student. lm_weight: λ; 1 is plain SFT. schedule: λ
    is constant (``hard``), grows to 1 (``hard_and_decay``) or is 1 - reward (``soft``). chunked: logits are never held
    whole. A loss of chunks of text takes temperature for the student too.
    Raises `UserError` for unknown names and values out of range.
    """

    kind: str = "ce"
    missing_mass: str = "renormalize"
    temperature: float = 1.0
    student_temperature: float = 1.0
    lm_weight: float = 0.9
    schedule: str = "hard"
    chunked: bool = True

    def __post_init__(self) -> None:
        LOSSES[self.kind]
        settings.check("loss", **vars(self))
        if self.on_chunks and self.student_temperature != 1.0:
            raise UserError(
                f"loss.student_temperature={self.student_temperature}: loss.kind={self.kind} takes loss.temperature "
                "for both sides; set loss.student_temperature=1"
            )

    @property
    def ranked(self) -> bool:
        """Whether entries are compared by rank, whatever their ids."""
        return "ranked" in LOSSES[self.kind].needs

    @property
    def on_chunks(self) -> bool:
        """Whether chunks of text are compared, whatever tokens spell them."""
        return "chunks" in LOSSES[self.kind].needs

    @property
    def split(self) -> bool:
        """Whether ids count for the tokens that both sides have, and ranks for the others."""
        return "split" in LOSSES[self.kind].needs

    def sft_share(self, progress: float, reward: Tensor) -> Tensor:
        """λ of each sequence, [B]. progress: share of the training that is done; reward [B]: exp(-CE) of the fused."""
        if self.schedule == "soft":
            return 1.0 - reward
        lam = self.lm_weight
        return torch.full_like(reward, lam + (1 - lam) * progress if self.schedule == "hard_and_decay" else lam)

    def teacher(self, logprobs: Tensor) -> Tensor:
        """p [.., K] from stored log-probabilities. Under a temperature, kept entries keep their mass (tail, zero)."""
        p = torch.softmax(logprobs / self.temperature, -1).nan_to_num(0.0)  # rows without entries stay zero
        return p if self.missing_mass == "renormalize" else p * logprobs.exp().sum(-1, keepdim=True).clamp_max(1.0)

    def divergence(self, p: Tensor, log_q: Tensor) -> Tensor:
        """D [N] from the teacher's p [N, K] and the student's log q at the same ids (or ranks)."""
        divergence: Tensor = LOSSES[self.kind].function(*self.outcomes(p, log_q))
        return divergence

    def outcomes(self, p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p, log p and log q of what D sums over: the kept entries and, as one more outcome, all other tokens together.

        [N, K] or [N, K + 1]. The one place that knows what becomes of the missing mass.
        """
        needs, renormalized, spare = LOSSES[self.kind].needs, self.missing_mass == "renormalize", p <= 0
        log_p = torch.where(spare, 1.0, p).log().masked_fill(spare, ABSENT)
        if self.on_chunks:
            return p, log_p, log_q / self.temperature
        log_q = log_q if self.ranked or self.split else log_q.masked_fill(spare, ABSENT)
        q_kept = log_q.exp().sum(-1, keepdim=True)
        if renormalized and "conditional" in needs:
            log_q = log_q - q_kept.clamp_min(TINY).log()
        if "kept" in needs or not (self.missing_mass == "tail" or (renormalized and "rest" in needs)):
            return p, log_p, log_q
        p_kept = p.sum(-1, keepdim=True)
        p_rest = torch.zeros_like(p_kept) if renormalized else (1 - p_kept).clamp_min(0.0)
        q_rest = (1 - q_kept).clamp_min(TINY)
        log_p = torch.cat([log_p, p_rest.clamp_min(TINY).log()], -1)
        return torch.cat([p, p_rest], -1), log_p, torch.cat([log_q, q_rest.log()], -1)
