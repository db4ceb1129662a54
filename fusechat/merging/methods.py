"""Merge methods as pure functions of one parameter's tensors: pivot and targets in, merged tensor out, all in fp32.

Shapes: J targets. delta_j = target_j - pivot. Nothing here reads files, knows names or changes its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusechat.errors import UserError

Weights = Sequence[float]


def linear(targets: Sequence[Tensor], weights: Weights, normalize: bool = True) -> Tensor:
    """sum_j w_j target_j, the weights made to sum to one where ``normalize`` is set (model soups, arXiv 2203.05482)."""
    scale = sum(weights) if normalize else 1.0
    merged = targets[0] * (weights[0] / scale)
    for target, weight in zip(targets[1:], weights[1:], strict=True):
        merged.add_(target, alpha=weight / scale)
    return merged


def task_arithmetic(pivot: Tensor, targets: Sequence[Tensor], weights: Weights, scale: float = 1.0, normalize: bool = False) -> Tensor:
    """pivot + scale * sum_j w_j delta_j (arXiv 2212.04089)."""
    factor = scale / (_total(weights) if normalize else 1.0)
    merged = pivot * (1 - factor * sum(weights))
    for target, weight in zip(targets, weights, strict=True):
        merged.add_(target, alpha=factor * weight)
    return merged


def element_weighted(pivot: Tensor, targets: Sequence[Tensor], power: int = 2) -> Tensor:
    """VaRM of single parameters: weights |delta_j|^power / sum_j |delta_j|^power; unchanged elements keep the pivot's value."""
    variations = [(target - pivot).abs_().pow_(power) for target in targets]
    total = sum(variations[1:], variations[0].clone())
    merged = torch.zeros_like(pivot)
    for target, variation in zip(targets, variations, strict=True):
        merged.addcmul_(variation, target)
    return torch.where(total > 0, merged / total, pivot)


def sce(pivot: Tensor, targets: Sequence[Tensor], density: float = 0.1, select: str = "weights") -> Tensor:
    """Select, calculate, erase (FuseChat 2.0, arXiv 2408.07990).

    Select the share ``density`` of elements whose variance over the targets is largest; weight each target by its mean
    squared selected delta; erase elements whose sign is the minority's; renormalise per element. ``select=weights`` (the
    authors') uses the selection for the weights alone, ``deltas`` (mergekit's) masks the deltas too.
    """
    deltas = torch.stack([target - pivot for target in targets])
    variance = deltas.var(0, unbiased=False)
    mask = _top(variance, density * float((variance > 0).float().mean())) if density < 1 else torch.ones_like(pivot, dtype=torch.bool)
    energy = (deltas.square() * mask).flatten(1).double().sum(1)
    if float(energy.sum()) == 0.0:
        return pivot.clone()
    weights = (energy / energy.sum()).float().view(-1, *[1] * pivot.dim())
    if select == "deltas":
        deltas = deltas * mask
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    kept = weights * (deltas * sign > 0)
    total = kept.sum(0)
    return pivot + torch.where(total > 0, (deltas * kept).sum(0) / total.clamp_min(1e-30), 0.0)


def ties(
    pivot: Tensor, targets: Sequence[Tensor], weights: Weights, density: Weights, scale: float = 1.0, normalize: bool = True
) -> Tensor:
    """TIES (arXiv 2306.01708): trim each delta to its largest elements, elect the sign of the weighted sum, average those who agree."""
    trimmed = [_top((target - pivot).abs(), d) * (target - pivot) for target, d in zip(targets, density, strict=True)]
    return pivot + scale * consensus(trimmed, weights, normalize)


def dare(
    pivot: Tensor, targets: Sequence[Tensor], weights: Weights, density: Weights, generator: torch.Generator,
    consensual: bool = False, scale: float = 1.0, normalize: bool = False,
) -> Tensor:  # fmt: skip
    """DARE (arXiv 2311.03099): drop deltas at random, rescale the rest by 1 / density; then a weighted sum, or the TIES consensus."""
    kept = []
    for target, d in zip(targets, density, strict=True):
        mask = torch.rand(pivot.shape, generator=generator) < d
        kept.append((target - pivot) * mask / d)
    return pivot + scale * (consensus(kept, weights, normalize) if consensual else _sum(kept, weights, normalize))


def della(
    pivot: Tensor, targets: Sequence[Tensor], weights: Weights, density: Weights, generator: torch.Generator, epsilon: float = 0.1,
    consensual: bool = True, scale: float = 1.0, normalize: bool = True,
) -> Tensor:  # fmt: skip
    """DELLA (arXiv 2406.11617): keep probabilities rise with magnitude, from density - epsilon to + epsilon, within each row."""
    kept = []
    for target, d in zip(targets, density, strict=True):
        delta = target - pivot
        rows = delta.reshape(-1, delta.shape[-1]) if delta.dim() > 1 else delta.reshape(1, -1)
        rank = rows.abs().argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).float()
        keep = (d - epsilon + 2 * epsilon * rank / max(1, rows.shape[1] - 1)).clamp(1e-6, 1.0)
        mask = torch.rand(rows.shape, generator=generator) < keep
        kept.append((rows * mask / keep).view_as(delta))
    return pivot + scale * (consensus(kept, weights, normalize) if consensual else _sum(kept, weights, normalize))


def breadcrumbs(
    pivot: Tensor, targets: Sequence[Tensor], weights: Weights, density: Weights, gamma: Weights,
    scale: float = 1.0, normalize: bool = False,
) -> Tensor:  # fmt: skip
    """Model breadcrumbs (arXiv 2312.06795): drop the share ``gamma`` of largest deltas and the smallest, keep ``density``."""
    kept = []
    for target, d, g in zip(targets, density, gamma, strict=True):
        delta = target - pivot
        size = delta.numel()
        top, count = int(size * g), int(size * d)
        below = size - top - count
        if below < 0:  # density and gamma overlap: the outliers give way
            top, below = top + below, 0
        order = delta.abs().flatten().argsort(stable=False)
        mask = torch.zeros(size)
        mask[order[below : size - top]] = 1.0
        kept.append(delta * mask.view_as(delta))
    return pivot + scale * _sum(kept, weights, normalize)


def slerp(first: Tensor, second: Tensor, t: float, eps: float = 1e-8) -> Tensor:
    """Spherical interpolation of two tensors as vectors, from ``first`` (t = 0) to ``second``; nearly parallel ones linearly."""
    a, b = first.flatten().double(), second.flatten().double()
    cosine = float((a / a.norm().clamp_min(eps)) @ (b / b.norm().clamp_min(eps)))
    if abs(cosine) > 0.9995:
        return ((1 - t) * first + t * second).float()
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    return ((math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)).view_as(first).float()


def slerp_chain(targets: Sequence[Tensor], t: float) -> Tensor:
    """SLERP of two targets; further ones are brought in one after another, each with equal say at t = 0.5."""
    merged = targets[0]
    for count, target in enumerate(targets[1:], 1):
        merged = slerp(merged, target, t if len(targets) == 2 else 1 / (count + 1))
    return merged


def model_stock(pivot: Tensor, targets: Sequence[Tensor], filter_wise: bool = False) -> Tensor:
    """Model Stock (arXiv 2403.19522): interpolate pivot and mean target by the angle between the deltas (per row: filter_wise)."""
    if len(targets) < 2:
        raise UserError("merge=model_stock needs at least two targets")
    shape = pivot.shape
    count = shape[0] if filter_wise and pivot.dim() > 1 else 1

    def rows(tensor: Tensor) -> Tensor:
        return tensor.reshape(count, -1)

    deltas = [rows(target - pivot) for target in targets]
    cosines = [
        torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-8) for i, a in enumerate(deltas) for b in deltas[i + 1 :]
    ]  # fmt: skip
    cosine, j = torch.stack(cosines).mean(0), len(targets)
    share = (j * cosine / (1 + (j - 1) * cosine)).unsqueeze(-1)
    mean = rows(linear(targets, [1.0] * j))
    return (share * mean + (1 - share) * rows(pivot)).reshape(shape)


def widen(pivot: Tensor, targets: Sequence[Tensor], ratio: float = 1.0, calibration: float = 1.0, transposed: bool = False) -> Tensor:
    """WIDEN (arXiv 2408.03092): merge magnitudes and directions of columns by their ranks of divergence from the pivot.

    W = W_0 + sum_j (S_m + S_D) / 2 * delta_j; scores above ratio * mean become ``calibration``. transposed: embeddings,
    whose rows are the vectors. 1-D parameters are scored by |delta| itself.
    """
    if transposed:
        return widen(pivot.t(), [t.t() for t in targets], ratio, calibration).t().contiguous()
    deltas = [target - pivot for target in targets]
    if pivot.dim() < 2:
        scores = _widen_scores(torch.stack([delta.abs().reshape(-1) for delta in deltas]), ratio, calibration)
        return pivot + torch.stack([delta * score.view_as(delta) for delta, score in zip(deltas, scores, strict=True)]).sum(0)
    norm, direction = _columns(pivot)
    magnitudes, angles = [], []
    for target in targets:
        own_norm, own = _columns(target)
        magnitudes.append((own_norm - norm).abs())
        angles.append(1 - torch.nn.functional.cosine_similarity(own, direction, dim=0))
    parts = [_widen_scores(_ranks(torch.stack(part)), ratio, calibration) for part in (magnitudes, angles)]
    weights = (parts[0] + parts[1]) / 2
    return pivot + torch.stack([delta * weight for delta, weight in zip(deltas, weights, strict=True)]).sum(0)


def consensus(deltas: Sequence[Tensor], weights: Weights, normalize: bool) -> Tensor:
    """The TIES consensus: weighted sum of the elements whose sign is that of the whole weighted sum, over their weights."""
    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    sign = torch.where(sum(weighted[1:], weighted[0].clone()) >= 0, 1.0, -1.0)
    merged, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for value, weight in zip(weighted, weights, strict=True):
        agrees = value.sign() == sign
        merged.add_(value * agrees)
        share.add_(agrees, alpha=weight)
    return merged / torch.where(share.abs() < 1e-8, 1.0, share) if normalize else merged


def _sum(deltas: Sequence[Tensor], weights: Weights, normalize: bool) -> Tensor:
    total = sum((delta * weight for delta, weight in zip(deltas[1:], weights[1:], strict=True)), deltas[0] * weights[0])
    return total / _total(weights) if normalize else total


def _total(weights: Weights) -> float:
    total = sum(weights)
    if abs(total) < 1e-8:
        raise UserError(f"the weights {list(weights)} sum to zero; set merge.normalize=false")
    return total


def _top(score: Tensor, density: float) -> Tensor:
    """Mask of the share ``density`` of largest elements, exactly int(density * size) of them."""
    count = int(density * score.numel())
    if count >= score.numel():
        return torch.ones_like(score, dtype=torch.bool)
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    if count:
        mask[score.flatten().topk(count, sorted=False).indices] = True
    return mask.view_as(score)


def _columns(matrix: Tensor) -> tuple[Tensor, Tensor]:
    norm = matrix.norm(dim=0, keepdim=False)
    return norm, matrix / norm.clamp_min(1e-12)


def _ranks(values: Tensor) -> Tensor:
    """Position of every element among its model's, as a share: [J, C] -> [J, C], ties in order."""
    size = values.shape[1]
    order = values.sort(dim=1, stable=True).indices
    return torch.empty_like(values).scatter_(1, order, (torch.arange(size, dtype=values.dtype) / size).expand_as(values))


def _widen_scores(values: Tensor, ratio: float, calibration: float) -> Tensor:
    """Softmax across models, ``calibration`` where a value exceeds ratio * its model's mean. values [J, C] -> [J, C]."""
    return torch.where(values > ratio * values.mean(1, keepdim=True), calibration, torch.softmax(values, 0))
