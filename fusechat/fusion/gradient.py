"""The loss with its gradient computed in the forward pass, chunk by chunk: the logits [N, V] are never held whole.

    L = Σ_n λ_n (lse(z_n) - z_n[gold]) + μ_n D(p_n, q_n),    q = softmax(z / T),    λ = sft_weight, μ = fusion_weight

D depends on the logits z only through log q at the K kept ids (or ranks). So with a = μ ∂D/∂log q, [N, K],

    ∂L/∂z = λ (softmax(z) - onehot(gold)) + (scatter(a) - q Σ_k a_k) / T:

one pass over the logits serves both losses, whatever the divergence. Where D is of a chunk of text, its log q is the
sum of its tokens' log q[gold], and each of them gets the chunk's a. Shapes: N positions, H hidden size, V vocabulary.
What is rounded in mixed precision, and what is not: `products`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusechat.fusion.losses import ABSENT, FusionLoss
from fusechat.fusion.products import add_product, at_least_fp32, compute_dtype, operand, product
from fusechat.fusion.shared import halves
from fusechat.fusion.slices import over_chunks, slices
from fusechat.fusion.targets import Targets


def fused_loss(hidden: Tensor, head: Any, targets: Targets, loss: FusionLoss) -> tuple[Tensor, Tensor]:
    """L from hidden states [N, H] through ``head`` (a `fusechat.models.heads.OutputHead`), never holding [N, V].

    Returns the weighted sum, and the unweighted sft and divergence of each position [2, N] (detached).
    """
    weight, bias = head.projection.weight, head.projection.bias
    if not torch.is_grad_enabled():  # inside a Function nobody can tell: say so by handing over detached tensors
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    compute, kind = compute_dtype(hidden), hidden.device.type
    with torch.autocast(kind, enabled=False):  # the operands are rounded and nothing else
        apply: Callable[..., tuple[Tensor, Tensor]] = _HiddenLoss.apply
        return apply(hidden, weight, bias, head, targets, loss, compute)


def loss_from_logits(logits: Tensor, targets: Targets, loss: FusionLoss) -> tuple[Tensor, Tensor]:
    """The same from logits [N, V], which are overwritten with their gradient: hand over a tensor nobody else reads."""
    logits = logits if torch.is_grad_enabled() else logits.detach()
    return _LogitLoss.apply(logits, targets, loss)  # type: ignore[no-any-return, no-untyped-call]


class _HiddenLoss(torch.autograd.Function):
    """z = transform(h Wᵀ + b). What is kept for the backward pass is ∂L/∂h, ∂L/∂W and ∂L/∂b themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Any,
        targets: Targets,
        loss: FusionLoss,
        compute: torch.dtype,
    ) -> Any:
        wanted = ctx.needs_input_grad[:3]
        exact = torch.promote_types(compute, torch.float32)
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        d_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and wanted[2] else None
        total, parts = hidden.new_zeros((), dtype=exact), []
        h, w = operand(hidden, compute), operand(weight, compute)
        together = [*slices(hidden, len(w), targets.chunk)]
        longest = max((part.stop - part.start for part in together), default=0)
        buffer = hidden.new_empty(longest, len(w), dtype=exact)
        for part in together:
            raw = product(h[part], w.t(), buffer[: part.stop - part.start])
            z = head.transform(raw if bias is None else raw.add_(bias))
            slope = _slope(head, z)
            value, each = _loss_and_gradient(z, targets.rows(part), loss, any(wanted))
            total += value
            parts.append(each)
            d_raw = z if slope is None else z.mul_(slope)
            gradient = operand(d_raw, compute)
            if d_hidden is not None:
                product(gradient, w, d_hidden[part])
            if d_weight is not None:
                add_product(d_weight, gradient.t(), h[part])
            if d_bias is not None:
                d_bias += d_raw.sum(0)
        ctx.gradients, ctx.dtype = (d_hidden, d_weight, d_bias), weight.dtype
        return total, _together(ctx, parts, total)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> Any:  # type: ignore[override]
        hidden, weight, bias = (None if g is None else g.mul_(upstream) for g in ctx.gradients)
        ctx.gradients = None
        weight, bias = (None if g is None else g.to(ctx.dtype) for g in (weight, bias))
        return hidden, weight, bias, None, None, None, None


class _LogitLoss(torch.autograd.Function):
    """The logits' own memory becomes ∂L/∂z."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Targets, loss: FusionLoss) -> Any:
        wanted, view = ctx.needs_input_grad[0], logits.detach()
        total, parts = logits.new_zeros((), dtype=at_least_fp32(logits)), []
        for part in slices(logits, logits.shape[1], targets.chunk):
            in_place = wanted and logits.dtype == total.dtype
            z = view[part] if in_place else view[part].to(total.dtype, copy=True)
            value, each = _loss_and_gradient(z, targets.rows(part), loss, wanted)
            total += value
            parts.append(each)
            if wanted and not in_place:
                view[part] = z.to(logits.dtype)
        ctx.gradient = view if wanted else None
        return total, _together(ctx, parts, total)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> Any:  # type: ignore[override]
        gradient, ctx.gradient = ctx.gradient.mul_(upstream.to(ctx.gradient.dtype)), None
        return gradient, None, None


def _loss_and_gradient(z: Tensor, targets: Targets, loss: FusionLoss, wanted: bool) -> tuple[Tensor, Tensor]:
    """L of n positions and its parts, sft and divergence [2, n]. z [n, V] is spent; where wanted it becomes ∂L/∂z."""
    temperature, p = loss.student_temperature, targets.p.to(z.dtype)
    ids, gold = targets.ids, targets.gold.unsqueeze(1)
    sft_weight, fusion_weight = targets.sft_weight.to(z.dtype), targets.fusion_weight.to(z.dtype)
    if loss.ranked:
        ids, p = z.topk(p.shape[1], -1).indices, p.sort(dim=-1, descending=True, stable=True).values
    if loss.split:
        ids, p, absent = halves(z, ids, p, targets.shared)
    z_gold, z_ids = z.gather(1, gold), z.gather(1, ids)
    q, lse_tempered = _tempered(z, temperature, wanted)
    peak = z.amax(-1, keepdim=True)
    exp_z = z.sub_(peak).exp_()  # in z's memory; softmax(z) = exp_z / mass
    mass = exp_z.sum(-1, keepdim=True)
    lse = peak + mass.log()
    sft = (lse - z_gold).squeeze(1)
    log_q = z_ids / temperature - (lse if lse_tempered is None else lse_tempered)
    if loss.split:
        log_q = log_q.masked_fill(absent, ABSENT)
    if targets.chunk is not None:
        log_q = over_chunks(log_q, targets.chunk)
    divergence, a = _weighted_divergence(p, log_q, fusion_weight, loss, wanted)
    if a is not None and targets.chunk is not None:
        a = over_chunks(a, targets.chunk)
    total = (sft * sft_weight + divergence * fusion_weight).sum()
    lam = sft_weight.unsqueeze(1)
    if a is not None:
        sum_a = a.sum(-1, keepdim=True)
        if q is None:  # T = 1: q is softmax(z)
            exp_z.mul_((lam - sum_a) / mass)
        else:
            exp_z.mul_(lam / mass).sub_(q.mul_(sum_a / temperature))
        exp_z.scatter_add_(1, ids, a / temperature)
        exp_z.scatter_add_(1, gold, -lam)
    return total, torch.stack([sft, divergence])


def _tempered(z: Tensor, temperature: float, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    """q = softmax(z / T), where wanted, and lse(z / T); at T = 1 neither needs a pass of its own."""
    if temperature == 1.0:
        return None, None
    tempered = z / temperature
    return tempered.softmax(-1) if wanted else None, tempered.logsumexp(-1, keepdim=True)


def _weighted_divergence(
    p: Tensor, log_q: Tensor, weight: Tensor, loss: FusionLoss, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """D [n] and, where wanted, a = weight ∂D/∂log q [n, K], by autograd: no divergence writes its own backward."""
    if not wanted:
        return loss.divergence(p, log_q), None
    with torch.enable_grad():
        leaf = log_q.requires_grad_()
        divergence = loss.divergence(p, leaf)
        (a,) = torch.autograd.grad((divergence * weight).sum(), leaf)
    return divergence.detach(), a


def _slope(head: Any, z: Tensor) -> Tensor | float | None:
    """∂z/∂raw of z = cap tanh(scale raw / cap): scale (1 - (z / cap)²); None where the transform does nothing."""
    if head.softcap:
        slope: Tensor = head.scale * (1 - (z / head.softcap) ** 2)
        return slope
    return None if head.scale == 1.0 else float(head.scale)


def _together(ctx: Any, parts: list[Tensor], total: Tensor) -> Tensor:
    """sft and divergence of all positions, [2, N], through which no gradient flows."""
    each = torch.cat(parts, 1) if parts else total.new_zeros(2, 0)
    ctx.mark_non_differentiable(each)
    return each
