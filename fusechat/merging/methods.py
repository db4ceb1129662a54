"""Merge methods as pure functions of one parameter: slices of pivot and targets in, slices of the merged tensor out, in fp32.

J targets, delta_j = target_j - pivot. What a method must know of the whole tensor it gathers in passes over the slices, so
that memory does not grow with the tensor (WIDEN excepted). Nothing here reads files, knows names or changes its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.merging.slices import Slices

Weights = Sequence[float]
Merged = Iterator[Tensor]


def linear(slices: Slices, weights: Weights, normalize: bool = True) -> Merged:
    """sum_j w_j target_j, the weights made to sum to one where ``normalize`` is set (model soups, arXiv 2203.05482)."""
    scale = sum(weights) if normalize else 1.0
    for _, targets in slices:
        yield _combined(targets, [weight / scale for weight in weights])


def task_arithmetic(slices: Slices, weights: Weights, scale: float = 1.0, normalize: bool = False) -> Merged:
    """pivot + scale * sum_j w_j delta_j (arXiv 2212.04089)."""
    factor = scale / (_total(weights) if normalize else 1.0)
    for pivot, targets in slices:
        yield _combined([pivot, *targets], [1 - factor * sum(weights), *(factor * weight for weight in weights)])


def element_weighted(slices: Slices, power: int = 2) -> Merged:
    """VaRM of single parameters: weights |delta_j|^power / sum_j |delta_j|^power; unchanged elements keep the pivot's value."""
    for pivot, targets in slices:
        variations = [(target - pivot).abs_().pow_(power) for target in targets]
        total = sum(variations[1:], variations[0].clone())
        merged = torch.zeros_like(pivot)
        for target, variation in zip(targets, variations, strict=True):
            merged.addcmul_(variation, target)
        unchanged = 1 - total.sign()
        yield merged.addcmul_(pivot, unchanged).div_(total.add_(unchanged))


def sce(slices: Slices, density: float = 0.1, select: str = "weights") -> Merged:
    """Select, calculate, erase (FuseChat 2.0, arXiv 2408.07990).

    Select the share ``density`` of elements whose variance over the targets is largest; weight each target by its mean
    squared selected delta; erase elements whose sign is the minority's; renormalise per element. ``select=weights`` (the
    authors') uses the selection for the weights alone, ``deltas`` (mergekit's) masks the deltas too.
    """
    selected = slices.largest(_variances, share=density) if density < 1 else None
    energy = torch.zeros(len(slices.targets), dtype=torch.float64)
    for deltas, mask in zip(slices.deltas(), selected.masks() if selected else slices.ones(), strict=True):
        energy += torch.stack([(delta * mask).dot(delta) for delta in deltas])
    if float(energy.sum()) == 0.0:
        yield from (pivot for pivot, _ in slices)
        return
    weights = (energy / energy.sum()).tolist()
    masks = selected.masks() if selected and select == "deltas" else slices.ones()
    for (pivot, targets), mask in zip(slices, masks, strict=True):
        deltas = [(target - pivot).mul_(mask) for target in targets]
        sign = _elected(deltas)
        merged, total = torch.zeros_like(pivot), torch.zeros_like(pivot)
        for delta, weight in zip(deltas, weights, strict=True):
            agreeing = delta.mul_(sign).clamp_min_(0.0)
            merged.add_(agreeing, alpha=weight)
            total.add_(agreeing.sign_(), alpha=weight)
        yield merged.div_(total.clamp_min_(1e-30)).mul_(sign).add_(pivot)


def ties(slices: Slices, weights: Weights, density: Weights, scale: float = 1.0, normalize: bool = True) -> Merged:
    """TIES (arXiv 2306.01708): trim each delta to its largest elements, elect the sign of the weighted sum, average those who agree."""
    cuts = [slices.of(j).largest(_magnitude, count=int(d * slices.size)) for j, d in enumerate(density)]
    for (pivot, targets), *masks in zip(slices, *(cut.masks() for cut in cuts), strict=True):
        trimmed = [(target - pivot).mul_(mask) for target, mask in zip(targets, masks, strict=True)]
        yield consensus(trimmed, weights, normalize).mul_(scale).add_(pivot)


def dare(
    slices: Slices,
    weights: Weights,
    density: Weights,
    seed: Sequence[int],
    consensual: bool = False,
    scale: float = 1.0,
    normalize: bool = False,
) -> Merged:
    """DARE (arXiv 2311.03099): drop deltas at random, rescale the rest by 1 / density; then a weighted sum, or the TIES consensus."""
    generators = _generators(seed, len(density))
    for pivot, targets in slices:
        kept = []
        for target, d, generator in zip(targets, density, generators, strict=True):
            kept.append((target - pivot).mul_(_below(generator, pivot, d)).div_(d))
        yield (
            (consensus(kept, weights, normalize) if consensual else _sum(kept, weights, normalize))
            .mul_(scale)
            .add_(pivot)
        )


def della(
    slices: Slices,
    weights: Weights,
    density: Weights,
    seed: Sequence[int],
    epsilon: float = 0.1,
    consensual: bool = True,
    scale: float = 1.0,
    normalize: bool = True,
) -> Merged:
    """DELLA (arXiv 2406.11617): keep probabilities rise with magnitude, from density - epsilon to + epsilon, within each row."""
    generators = _generators(seed, len(density))
    for pivot, targets in slices.rows():
        kept = []
        for target, d, generator in zip(targets, density, generators, strict=True):
            delta = target - pivot
            rank = delta.abs().argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).float()
            keep = (d - epsilon + 2 * epsilon * rank / max(1, delta.shape[1] - 1)).clamp_(1e-6, 1.0)
            kept.append(delta.mul_(_below(generator, delta, keep)).div_(keep))
        yield (
            (consensus(kept, weights, normalize) if consensual else _sum(kept, weights, normalize))
            .mul_(scale)
            .add_(pivot)
        )


def breadcrumbs(
    slices: Slices, weights: Weights, density: Weights, gamma: Weights, scale: float = 1.0, normalize: bool = False
) -> Merged:
    """Model breadcrumbs (arXiv 2312.06795): drop the share ``gamma`` of largest deltas and the smallest, keep ``density``."""
    cuts = []
    for j, (d, g) in enumerate(zip(density, gamma, strict=True)):
        kept = int(slices.size * d)
        top = min(int(slices.size * g), slices.size - kept)  # where density and gamma overlap, the outliers give way
        cuts += [slices.of(j).largest(_magnitude, count=count) for count in (kept + top, top)]
    for (pivot, targets), *masks in zip(slices, *(cut.masks() for cut in cuts), strict=True):
        wanted = [masks[2 * j] - masks[2 * j + 1] for j in range(len(targets))]
        deltas = [(target - pivot).mul_(mask) for target, mask in zip(targets, wanted, strict=True)]
        yield _sum(deltas, weights, normalize).mul_(scale).add_(pivot)


def slerp(slices: Slices, t: float, eps: float = 1e-8) -> Merged:
    """Spherical interpolation of two targets as vectors, from the first (t = 0) to the second; nearly parallel ones linearly.

    Further targets are brought in one after another, each with equal say. Angles come from the targets' scalar products.
    """
    gram = sum(
        torch.stack([torch.stack([a.dot(b) for b in targets]) for a in targets]).double() for _, targets in slices
    )
    assert isinstance(gram, Tensor)
    merged = torch.eye(len(slices.targets), dtype=torch.float64)[0]  # the result is a combination: its coefficients
    for count, other in enumerate(torch.eye(len(merged), dtype=torch.float64)[1:], 1):
        share = t if len(merged) == 2 else 1 / (count + 1)
        norms = [float((v @ gram @ v).clamp_min(0.0).sqrt().clamp_min(eps)) for v in (merged, other)]
        cosine = float(merged @ gram @ other) / (norms[0] * norms[1])
        if abs(cosine) > 0.9995:
            merged = (1 - share) * merged + share * other
            continue
        angle = math.acos(max(-1.0, min(1.0, cosine)))
        merged = (math.sin((1 - share) * angle) * merged + math.sin(share * angle) * other) / math.sin(angle)
    yield from (_combined(targets, merged.tolist()) for _, targets in slices)


def model_stock(slices: Slices, filter_wise: bool = False) -> Merged:
    """Model Stock (arXiv 2403.19522): interpolate pivot and mean target by the angle between the deltas (per row: filter_wise)."""
    count = len(slices.targets)
    if count < 2:
        raise UserError("merge=model_stock needs at least two targets")
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]

    def products(pivot: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """Scalar products of the deltas [J, J, rows]."""
        deltas = [target - pivot for target in targets]
        return torch.stack([torch.stack([(a * b).sum(-1) for b in deltas]) for a in deltas]).double()

    def share(gram: Tensor) -> Tensor:
        norms = gram.diagonal().T.sqrt().clamp_min(1e-8)
        cosine = torch.stack([gram[i, j] / (norms[i] * norms[j]) for i, j in pairs]).mean(0)
        return (count * cosine / (1 + (count - 1) * cosine)).float()

    by_row = filter_wise and len(slices.shape) > 1
    whole = None if by_row else share(torch.stack([products(*part) for part in slices]).sum(0))
    for pivot, targets in slices.rows() if by_row else slices:
        part = share(products(pivot, targets)).unsqueeze(-1) if whole is None else whole
        yield part * _combined(targets, [1 / count] * count) + (1 - part) * pivot


def widen(slices: Slices, ratio: float = 1.0, calibration: float = 1.0, transposed: bool = False) -> Merged:
    """WIDEN (arXiv 2408.03092) of a whole tensor, see `_widen`. transposed: embeddings, whose rows are the vectors."""
    pivot, *targets = slices.whole()
    yield (
        _widen(pivot.t(), [t.t() for t in targets], ratio, calibration).t().contiguous()
        if transposed
        else _widen(pivot, targets, ratio, calibration)
    )


def _widen(pivot: Tensor, targets: Sequence[Tensor], ratio: float, calibration: float) -> Tensor:
    """Merge magnitudes and directions of columns by their ranks of divergence from the pivot.

    W = W_0 + sum_j (S_m + S_D) / 2 * delta_j; scores above ratio * mean become ``calibration``. 1-D parameters are
    scored by |delta| itself.
    """
    deltas = [target - pivot for target in targets]
    if pivot.dim() < 2:
        scores = _widen_scores(torch.stack([delta.abs().reshape(-1) for delta in deltas]), ratio, calibration)
        return pivot + torch.stack(
            [delta * score.view_as(delta) for delta, score in zip(deltas, scores, strict=True)]
        ).sum(0)
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
    sign = _elected(weighted)
    merged, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for value, weight in zip(weighted, weights, strict=True):
        agreeing = value.mul_(sign).clamp_min_(0.0)
        merged.add_(agreeing)
        share.add_(agreeing.sign_(), alpha=weight)
    merged.mul_(sign)
    return merged.div_(torch.where(share.abs() < 1e-8, 1.0, share)) if normalize else merged


def _elected(values: Sequence[Tensor]) -> Tensor:
    """1 or -1 by the sign of the sum; a sum of zero counts as positive."""
    return torch.copysign(torch.ones(()), sum(values[1:], values[0].clone()))


def _sum(deltas: Sequence[Tensor], weights: Weights, normalize: bool) -> Tensor:
    total = _combined(deltas, weights)
    return total.div_(_total(weights)) if normalize else total


def _combined(tensors: Sequence[Tensor], weights: Weights) -> Tensor:
    merged = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        merged.add_(tensor, alpha=weight)
    return merged


def _variances(pivot: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Of the targets, element by element; taken from the first, so that equal targets give exactly zero."""
    first, second = torch.zeros_like(pivot), torch.zeros_like(pivot)
    for target in targets[1:]:
        apart = target - targets[0]
        first.add_(apart)
        second.addcmul_(apart, apart)
    return second.div_(len(targets)).sub_(first.div_(len(targets)).square_()).clamp_min_(0.0)


def _magnitude(pivot: Tensor, targets: Sequence[Tensor]) -> Tensor:
    return (targets[0] - pivot).abs_()


def _generators(seed: Sequence[int], count: int) -> list[np.random.Generator]:
    """One per target, so that a mask depends neither on the other targets nor on how the tensor is sliced."""
    return [np.random.Generator(np.random.SFC64([*seed, j])) for j in range(count)]


def _below(generator: np.random.Generator, like: Tensor, limit: float | Tensor) -> Tensor:
    """1 where a uniform draw is below the limit, else 0."""
    return (limit - torch.from_numpy(generator.random(like.shape, dtype=np.float32))).sign_().clamp_min_(0.0)


def _total(weights: Weights) -> float:
    total = sum(weights)
    if abs(total) < 1e-8:
        raise UserError(f"the weights {list(weights)} sum to zero; set merge.normalize=false")
    return total


def _columns(matrix: Tensor) -> tuple[Tensor, Tensor]:
    norm = matrix.norm(dim=0, keepdim=False)
    return norm, matrix / norm.clamp_min(1e-12)


def _ranks(values: Tensor) -> Tensor:
    """Position of every element among its model's, as a share: [J, C] -> [J, C], ties in order."""
    size = values.shape[1]
    order = values.sort(dim=1, stable=True).indices
    return torch.empty_like(values).scatter_(
        1, order, (torch.arange(size, dtype=values.dtype) / size).expand_as(values)
    )


def _widen_scores(values: Tensor, ratio: float, calibration: float) -> Tensor:
    """Softmax across models, ``calibration`` where a value exceeds ratio * its model's mean. values [J, C] -> [J, C]."""
    return torch.where(values > ratio * values.mean(1, keepdim=True), calibration, torch.softmax(values, 0))
