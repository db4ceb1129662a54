"""Losses from dense distributions over the whole vocabulary, and examples for them."""

import torch
from torch import Tensor

from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.targets import Targets


def dense(logits: Tensor, logprobs: Tensor, targets: Targets, loss: FusionLoss) -> Tensor:
    """The textbook, over the whole vocabulary: to be checked by eye."""
    n, v = logits.shape
    log_q = (logits / loss.student_temperature).log_softmax(-1)
    q, p = log_q.exp(), logits.new_zeros(n, v).scatter(1, targets.ids, loss.teacher(logprobs))
    kept = torch.zeros(n, v, dtype=torch.bool).scatter(1, targets.ids, logprobs > -torch.inf)
    if loss.kind == "uld":
        top = q.sort(-1, descending=True).values[:, : targets.ids.shape[1]]
        each = (targets.p - top).abs().sum(-1)
        return each + ((1 - targets.p.sum(-1)) - (1 - top.sum(-1))).abs() if loss.missing_mass == "tail" else each
    if loss.kind == "standardized_uld":
        ours = [row.topk(int(many.sum())).values for row, many in zip(logits, logprobs > -torch.inf, strict=True)]
        theirs = [row[row > -torch.inf].sort(descending=True).values for row in logprobs]
        pairs = zip(ours, theirs, strict=True)
        shapes = [((x - x.mean()) / x.std(correction=0), (y - y.mean()) / y.std(correction=0)) for x, y in pairs]
        return torch.stack([(x - y).abs().sum() for x, y in shapes])
    rest = loss.missing_mass == "tail" or (loss.kind == "jsd" and loss.missing_mass == "renormalize")
    p_all, q_all = torch.where(kept, p, 0.0), torch.where(kept, q, 0.0)
    if loss.kind == "reverse_kl" and loss.missing_mass == "renormalize":
        q_all = q_all / q_all.sum(-1, keepdim=True)
    if rest:
        p_tail = (1 - p.sum(-1, keepdim=True)).clamp_min(0) if loss.missing_mass == "tail" else logits.new_zeros(n, 1)
        p_all, q_all = torch.cat([p_all, p_tail], 1), torch.cat([q_all, 1 - q_all.sum(-1, keepdim=True)], 1)
    xlogy = torch.special.xlogy
    if loss.kind == "ce":
        return -xlogy(p_all, torch.where(p_all > 0, q_all, 1.0)).sum(-1)
    if loss.kind in ("forward_kl", "hybrid"):  # all tokens are common: the whole divergence is by id
        return (xlogy(p_all, p_all) - xlogy(p_all, torch.where(p_all > 0, q_all, 1.0))).sum(-1)
    if loss.kind == "reverse_kl":
        return xlogy(q_all, torch.where(q_all > 0, q_all / torch.where(q_all > 0, p_all, 1.0), 1.0)).sum(-1)
    mean = (p_all + q_all) / 2
    safe = torch.where(mean > 0, mean, 1.0)
    return (xlogy(p_all, p_all) - xlogy(p_all, safe) + xlogy(q_all, q_all) - xlogy(q_all, safe)).sum(-1) / 2


def example(n: int, v: int, k: int) -> tuple[Tensor, Tensor, Targets]:
    """Random logits, stored log-probabilities (ragged: one row lacks an entry) and targets without p."""
    torch.manual_seed(0)
    teacher = torch.randn(n, v).mul(2).log_softmax(-1)
    values, ids = teacher.topk(k)
    values[0, -1] = -torch.inf
    weights = torch.rand(2, n) / n
    return torch.randn(n, v), values, Targets(ids, values, torch.randint(0, v, (n,)), weights[0], weights[1])


def in_float64(targets: Targets) -> Targets:
    return Targets(
        *(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in vars(targets).values())
    )
