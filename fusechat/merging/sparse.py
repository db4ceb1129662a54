"""Merge methods that drop elements of the deltas: by magnitude, by chance, by variance, by sign."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fusechat.app.errors import one_of
from fusechat.merging.family import METHODS, Parts, Weights, combined, total_of
from fusechat.merging.selection import Largest, everything, largest_deltas, most_varying
from fusechat.merging.slices import Slices


@METHODS.register("ties", "trim, elect sign, merge", needs=("weights", "density"))
def ties(slices: Slices, weights: Weights, density: Weights, scale: float = 1.0, normalize: bool = True) -> Parts:
    """TIES (arXiv 2306.01708): trim each δ_j to its largest elements, elect a sign, merge those who agree.

    density: share of elements kept. θ = θ_0 + scale · consensus of the trimmed deltas, see `consensus`.
    """
    chosen = largest_deltas(slices, [int(d * slices.size) for d in density])
    if slices.compiled:
        from fusechat.merging import compiled  # here: numba takes longer to import than some merges

        yield from compiled.ties(slices, chosen, weights, scale, normalize)
        return
    for pivot, targets in slices:
        masks = chosen.masks(pivot, targets)
        trimmed = [(target - pivot).mul_(mask) for target, mask in zip(targets, masks, strict=True)]
        yield consensus(trimmed, weights, normalize).mul_(scale).add_(pivot)


@METHODS.register("dare", "drop at random and rescale", needs=("weights", "density", "seed"))
def dare(
    slices: Slices,
    weights: Weights,
    density: Weights,
    seed: Sequence[int],
    consensual: bool = False,
    scale: float = 1.0,
    normalize: bool = True,
) -> Parts:
    """DARE (arXiv 2311.03099): δ_j ← m_j ⊙ δ_j / p_j with m_j ~ Bernoulli(p_j), p = ``density``.

    Then their weighted sum or, ``consensual``, the TIES consensus.
    """
    merge = consensus if consensual else weighted_sum
    generators = _generators(seed, len(density))
    for pivot, targets in slices:
        rescaled = []
        for target, keep, generator in zip(targets, density, generators, strict=True):
            kept = _below(generator, pivot, keep)
            rescaled.append((target - pivot).mul_(kept).div_(keep))
        yield merge(rescaled, weights, normalize).mul_(scale).add_(pivot)


@METHODS.register("della", "drop at random by magnitude", needs=("weights", "density", "seed"))
def della(
    slices: Slices,
    weights: Weights,
    density: Weights,
    seed: Sequence[int],
    epsilon: float = 0.1,
    consensual: bool = True,
    scale: float = 1.0,
    normalize: bool = True,
) -> Parts:
    """DELLA (arXiv 2406.11617): DARE with probabilities that rise with the rank r of |δ| among its row's n elements.

    p = density − ε + 2ε · r / (n − 1).
    """
    merge = consensus if consensual else weighted_sum
    generators = _generators(seed, len(density))
    for pivot, targets in slices.rows():
        last = max(1, pivot.shape[1] - 1)
        places = torch.arange(pivot.shape[1], dtype=pivot.dtype, device=pivot.device)
        rescaled = []
        for target, d, generator in zip(targets, density, generators, strict=True):
            delta = target - pivot
            order = delta.abs().argsort(dim=-1, stable=True)
            rank = torch.empty_like(delta).scatter_(-1, order, places.expand_as(delta))
            keep = (d - epsilon + 2 * epsilon * rank / last).clamp_(1e-6, 1.0)
            rescaled.append(delta.mul_(_below(generator, delta, keep)).div_(keep))
        yield merge(rescaled, weights, normalize).mul_(scale).add_(pivot)


@METHODS.register("breadcrumbs", "drop outliers and small deltas", needs=("weights", "density", "gamma"))
def breadcrumbs(
    slices: Slices, weights: Weights, density: Weights, gamma: Weights, scale: float = 1.0, normalize: bool = True
) -> Parts:
    """Model breadcrumbs (arXiv 2312.06795): drop each δ_j's share ``gamma`` of largest, keep the next ``density``."""
    kept = [int(slices.size * d) for d in density]
    dropped = [  # where density and gamma overlap, the outliers give way
        min(int(slices.size * g), slices.size - count) for g, count in zip(gamma, kept, strict=True)
    ]
    wide = largest_deltas(slices, [a + b for a, b in zip(kept, dropped, strict=True)])
    outliers = largest_deltas(slices, dropped)
    for pivot, targets in slices:
        masks = zip(wide.masks(pivot, targets), outliers.masks(pivot, targets), strict=True)
        deltas = [(target - pivot).mul_(a - b) for target, (a, b) in zip(targets, masks, strict=True)]
        yield weighted_sum(deltas, weights, normalize).mul_(scale).add_(pivot)


@METHODS.register("sce", "select, calculate, erase (FuseChat 2.0)")
def sce(slices: Slices, density: float = 0.1, select: str = "weights") -> Parts:
    """Select, calculate, erase (FuseChat 2.0, arXiv 2408.07990).

    Select the share τ = ``density`` of the elements that vary at all, those of largest variance over the targets;
    calculate w_j = Σ δ̂_j² / Σ_i Σ δ̂_i² from the selected δ̂; erase elements whose sign is not that of Σ_j δ_j;
    divide what is left by the weights of those who agree. ``select=weights`` (the authors') uses the selection for
    the weights alone, ``select=deltas`` (mergekit's) masks the deltas too.
    """
    one_of(select, ("weights", "deltas"), "merge.select")
    chosen = most_varying(slices, density) if density < 1 else everything()
    again = chosen.anew() if select == "deltas" else everything()
    weights = _energy_shares(slices, chosen)
    if weights is None:
        yield from (pivot for pivot, _ in slices)
        return
    if slices.compiled:
        from fusechat.merging import compiled  # here: numba takes longer to import than some merges

        yield from compiled.erased(slices, again, weights)
        return
    for pivot, targets in slices:
        (mask,) = again.masks(pivot, targets)
        yield _erased([(target - pivot).mul_(mask) for target in targets], weights).add_(pivot)


def _energy_shares(slices: Slices, chosen: Largest) -> list[float] | None:
    """w_j = Σ δ_j² / Σ_i Σ δ_i² over the chosen elements; None where no target changed any of them."""
    energy = torch.zeros(len(slices.targets), dtype=torch.float64)
    if slices.compiled:
        from fusechat.merging import compiled

        energy = compiled.energies(slices, chosen)
    else:
        for pivot, targets in slices:
            (mask,) = chosen.masks(pivot, targets)
            deltas = [target - pivot for target in targets]
            energy += torch.stack([(delta * mask).dot(delta) for delta in deltas]).cpu()
    total = energy.sum()
    return (energy / total).tolist() if float(total) else None


def _erased(deltas: Sequence[Tensor], weights: Weights) -> Tensor:
    """Σ_j w_j δ_j / Σ_j w_j over the j whose sign is that of Σ_j δ_j, element by element; zero where none agrees."""
    sign = _elected(deltas)
    merged, total = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing = delta.mul_(sign).clamp_min_(0.0)
        merged.add_(agreeing, alpha=weight)
        total.add_(agreeing.sign_(), alpha=weight)
    return merged.div_(total.clamp_min_(1e-30)).mul_(sign)


def consensus(deltas: Sequence[Tensor], weights: Weights, normalize: bool) -> Tensor:
    """The TIES consensus: Σ w_j δ_j over the j whose sign is the whole sum's; ``normalize`` divides by their Σ w_j."""
    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    sign = _elected(weighted)
    merged, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for value, weight in zip(weighted, weights, strict=True):
        agreeing = value.mul_(sign).clamp_min_(0.0)
        merged.add_(agreeing)
        share.add_(agreeing.sign_(), alpha=weight)
    merged.mul_(sign)
    return merged.div_(torch.where(share.abs() < 1e-8, 1.0, share)) if normalize else merged


def weighted_sum(deltas: Sequence[Tensor], weights: Weights, normalize: bool) -> Tensor:
    """Σ_j w_j δ_j; ``normalize`` divides by Σ_j w_j."""
    total = combined(deltas, weights)
    return total.div_(total_of(weights)) if normalize else total


def _elected(values: Sequence[Tensor]) -> Tensor:
    """1 or -1 by the sign of the sum; a sum of zero counts as positive."""
    return sum(values[1:], values[0].clone()).ge(0).mul(2.0).sub_(1.0)


def _generators(seed: Sequence[int], count: int) -> list[np.random.Generator]:
    """One per target, so that a mask depends neither on the other targets nor on how the tensor is sliced."""
    return [np.random.Generator(np.random.SFC64([*seed, j])) for j in range(count)]


def _below(generator: np.random.Generator, like: Tensor, limit: float | Tensor) -> Tensor:
    """1 where a uniform draw is below the limit, else 0."""
    draws = torch.from_numpy(generator.random(like.shape, dtype=np.float32)).to(like.device)
    return (limit - draws).sign_().clamp_min_(0.0)
