"""The fusion-distillation loss on sparse targets, its gradient computed in the forward pass, chunk by chunk.

L = sum_n  sft_weight[n] * (lse - z_gold) + fusion_weight[n] * divergence(p_n, q_n), with q = softmax(z / T).
Every divergence here depends on the student only through log q at the K kept ids, so with a = d divergence / d log q
the gradient is d/dz = (scatter(a) - sum(a) * q) / T: one pass over the logits serves both losses.

Shapes: N positions, D hidden size, V vocabulary, K kept entries. Spare entries have id 0 and p = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusechat.app.errors import one_of

KINDS = ("ce", "forward_kl", "reverse_kl", "jsd", "uld")
MISSING = ("renormalize", "tail", "zero")
CHUNK_ELEMENTS = 1 << 22  # logits held at a time: 16 MiB in fp32; fewer rows make the matrix products slower
TINY = 1e-12


@dataclass(frozen=True)
class Targets:
    """What the student is trained on at N positions. ids, p [N, K]; gold, sft_weight, fusion_weight [N]."""

    ids: Tensor
    p: Tensor
    gold: Tensor
    sft_weight: Tensor
    fusion_weight: Tensor

    def rows(self, part: slice) -> Targets:
        """The targets of some positions."""
        return Targets(self.ids[part], self.p[part], self.gold[part], self.sft_weight[part], self.fusion_weight[part])


@dataclass(frozen=True)
class FusionLoss:
    """Which divergence, at which temperatures, and what becomes of the mass outside the kept entries.

    temperature sharpens or flattens the teacher alone, as released; student_temperature the student.
    ce: -sum p log q; forward_kl: ce minus the entropy of p; reverse_kl, jsd; uld: sorted-probability distance
    (arXiv 2402.12030), where ids do not count. missing_mass: ``renormalize`` p to sum to one (published); ``tail``:
    one more outcome stands for all other tokens, in p and in q; ``zero``: other tokens contribute nothing.
    reverse_kl under ``renormalize`` renormalises q over the kept ids too, for it would be infinite otherwise.
    Raises `fusechat.app.errors.UserError` for unknown names.
    """

    kind: str = "ce"
    missing_mass: str = "renormalize"
    temperature: float = 1.0
    student_temperature: float = 1.0

    def __post_init__(self) -> None:
        one_of(self.kind, KINDS, "loss.kind")
        one_of(self.missing_mass, MISSING, "loss.missing_mass")

    def teacher(self, logprobs: Tensor) -> Tensor:
        """p [.., K] from stored log-probabilities. Under a temperature the kept entries keep their total mass (tail, zero)."""
        p = torch.softmax(logprobs / self.temperature, -1).nan_to_num(0.0)  # rows without entries stay zero
        return p if self.missing_mass == "renormalize" else p * logprobs.exp().sum(-1, keepdim=True).clamp_max(1.0)

    def divergence(self, p: Tensor, log_q: Tensor) -> Tensor:
        """[N] from teacher p [N, K] and the student's log-probabilities at the same ids; differentiable in log_q."""
        present = p > 0
        log_p = torch.where(present, p, 1.0).log()
        if self.kind == "uld":  # by rank: entries the teacher lacks count as zero
            distance = (p - log_q.exp()).abs().sum(-1)
            return (
                distance + ((1 - p.sum(-1)) - (1 - log_q.exp().sum(-1))).abs()
                if self.missing_mass == "tail"
                else distance
            )
        log_q = log_q.masked_fill(~present, 0.0)
        q = log_q.exp() * present
        p_tail, q_tail = (1 - p.sum(-1)).clamp_min(0.0), (1 - q.sum(-1)).clamp_min(TINY)
        if self.missing_mass == "renormalize":
            p_tail = torch.zeros_like(p_tail)
        tail = self.missing_mass == "tail"
        if self.kind in ("ce", "forward_kl"):
            entropy = self.kind == "forward_kl"
            loss = -(p * log_q).sum(-1) + ((p * log_p).sum(-1) if entropy else 0.0)
            return loss + (_term(p_tail, q_tail, entropy) if tail else 0.0)
        if self.kind == "reverse_kl":
            if self.missing_mass == "renormalize":
                log_q = log_q - q.sum(-1, keepdim=True).clamp_min(TINY).log()
                q = log_q.exp() * present
            loss = (q * (log_q - log_p)).sum(-1)
            return loss + (q_tail * (q_tail.log() - p_tail.clamp_min(TINY).log()) if tail else 0.0)
        mean = torch.where(present, (p + q) / 2, 1.0).log()
        loss = ((p * (log_p - mean)).sum(-1) + (q * (log_q - mean)).sum(-1)) / 2
        if self.missing_mass == "zero":
            return loss
        middle = ((p_tail + q_tail) / 2).log()
        return loss + (q_tail * (q_tail.log() - middle) + p_tail * (p_tail.clamp_min(TINY).log() - middle)) / 2


def _term(p: Tensor, q: Tensor, entropy: bool) -> Tensor:
    cross = -p * q.log()
    return cross + torch.where(p > 0, p * p.clamp_min(TINY).log(), 0.0) if entropy else cross


def fused_loss(hidden: Tensor, head: Any, targets: Targets, loss: FusionLoss) -> tuple[Tensor, Tensor]:
    """Loss from hidden states [N, D] through ``head`` (a `fusechat.models.heads.OutputHead`), never holding [N, V].

    Returns the weighted sum, and the unweighted sft and divergence of each position [2, N] (detached).
    """
    weight, bias = head.head.weight, head.head.bias
    if not torch.is_grad_enabled():  # inside a Function nobody can tell: say so by handing over detached tensors
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return _HiddenLoss.apply(hidden, weight, bias, head, targets, loss)  # type: ignore[no-any-return, no-untyped-call]


def loss_from_logits(logits: Tensor, targets: Targets, loss: FusionLoss) -> tuple[Tensor, Tensor]:
    """The same from logits [N, V], which are overwritten with their gradient: hand over a tensor nobody else reads."""
    logits = logits if torch.is_grad_enabled() else logits.detach()
    return _LogitLoss.apply(logits, targets, loss)  # type: ignore[no-any-return, no-untyped-call]


class _HiddenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Any, targets: Targets, loss: FusionLoss
    ) -> Any:
        wanted = ctx.needs_input_grad
        cast = weight.to(hidden.dtype)
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        total, parts = hidden.new_zeros((), dtype=torch.float32), []
        buffer = hidden.new_empty(min(chunk, len(hidden)), weight.shape[0])
        for start in range(0, len(hidden), chunk):
            part = slice(start, min(start + chunk, len(hidden)))
            raw = torch.mm(hidden[part], cast.t(), out=buffer[: part.stop - start])
            z = head.transform(raw if bias is None else raw.add_(bias)).float()
            slope = 1 - (z / head.softcap) ** 2 if head.softcap else None
            value, each = _gradient(z, targets.rows(part), loss, any(wanted[:3]))
            total += value
            parts.append(each)
            if slope is not None:
                z.mul_(slope)
            if head.scale != 1.0:
                z.mul_(head.scale)
            gradient = z.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(gradient, cast, out=d_hidden[part])
            if d_weight is not None:
                _add_outer(d_weight, gradient, hidden[part])
            if d_bias is not None:
                d_bias += z.sum(0)
        ctx.grads = (d_hidden, d_weight, d_bias)
        ctx.dtype = weight.dtype
        each = torch.cat(parts, 1) if parts else total.new_zeros(2, 0)
        ctx.mark_non_differentiable(each)
        return total, each

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> Any:  # type: ignore[override]
        hidden, weight, bias = (None if g is None else g.mul_(upstream) for g in ctx.grads)
        ctx.grads = None
        return (
            hidden,
            None if weight is None else weight.to(ctx.dtype),
            None if bias is None else bias.to(ctx.dtype),
            None,
            None,
            None,
        )


class _LogitLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Targets, loss: FusionLoss) -> Any:
        wanted, view = ctx.needs_input_grad[0], logits.detach()
        chunk = max(1, CHUNK_ELEMENTS // logits.shape[1])
        total, parts = logits.new_zeros((), dtype=torch.float32), []
        for start in range(0, len(logits), chunk):
            part = slice(start, min(start + chunk, len(logits)))
            z = view[part] if wanted and logits.dtype == torch.float32 else view[part].float().clone()
            value, each = _gradient(z, targets.rows(part), loss, wanted)
            total += value
            parts.append(each)
            if wanted and z.data_ptr() != view[part].data_ptr():
                view[part] = z.to(logits.dtype)
        ctx.gradient = view if wanted else None
        each = torch.cat(parts, 1) if parts else total.new_zeros(2, 0)
        ctx.mark_non_differentiable(each)
        return total, each

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> Any:  # type: ignore[override]
        gradient, ctx.gradient = ctx.gradient.mul_(upstream.to(ctx.gradient.dtype)), None
        return gradient, None, None


def _gradient(z: Tensor, targets: Targets, loss: FusionLoss, wanted: bool) -> tuple[Tensor, Tensor]:
    """Loss of some positions from fp32 logits z [n, V], which become d loss / d z. Returns sum and parts [2, n]."""
    temperature, ids = loss.student_temperature, targets.ids
    if loss.kind == "uld":
        ids = z.topk(targets.p.shape[1], -1).indices
    z_gold, z_ids = z.gather(1, targets.gold.unsqueeze(1)), z.gather(1, ids)
    tempered = (z / temperature).softmax(-1) if temperature != 1.0 and wanted else None
    lse_t = (z / temperature).logsumexp(-1, keepdim=True) if temperature != 1.0 else None
    peak = z.amax(-1, keepdim=True)
    mass = z.sub_(peak).exp_().sum(-1, keepdim=True)
    lse = peak + mass.log()
    sft = (lse - z_gold).squeeze(1)
    log_q = z_ids / temperature - (lse if lse_t is None else lse_t)
    a = torch.zeros_like(log_q)
    if wanted:
        with torch.enable_grad():
            leaf = log_q.requires_grad_()
            (a,) = torch.autograd.grad((loss.divergence(targets.p, leaf) * targets.fusion_weight).sum(), leaf)
    divergence = loss.divergence(targets.p, log_q.detach())
    total = (sft * targets.sft_weight + divergence * targets.fusion_weight).sum()
    if wanted:
        dense = -a.sum(-1, keepdim=True)
        if tempered is None:
            z.mul_((targets.sft_weight.unsqueeze(1) + dense) / mass)
        else:
            z.mul_(targets.sft_weight.unsqueeze(1) / mass).add_(tempered.mul_(dense / temperature))
        z.scatter_add_(1, ids, a / temperature)
        z.scatter_add_(1, targets.gold.unsqueeze(1), -targets.sft_weight.unsqueeze(1))
    return total, torch.stack([sft, divergence])


def _add_outer(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, in the total's precision."""
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right)
    else:
        total += left.t() @ right


def schedule_weight(schedule: str, lm_weight: float, progress: float, reward: Tensor) -> Tensor:
    """lambda of each sequence [B]: ``hard`` constant, ``hard_and_decay`` towards SFT, ``soft`` 1 - reward. reward [B]."""
    if schedule == "soft":
        return 1.0 - reward
    value = lm_weight + (1 - lm_weight) * progress if schedule == "hard_and_decay" else lm_weight
    return torch.full_like(reward, value)
