"""Merge methods in which every element of every target has its say: weighted sums, and interpolation by angles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from fusechat.merging.family import METHODS, Parts, Weights, combined, total_of
from fusechat.merging.slices import Slices

PARALLEL = 0.9995  # cosine from which slerp interpolates linearly
SMALLEST = 1e-8  # norm below which a vector has no direction


@METHODS.register("linear", "weighted mean", needs=("weights",))
def linear(slices: Slices, weights: Weights, normalize: bool = True) -> Parts:
    """θ = Σ_j w_j θ_j, the weights made to sum to one where ``normalize`` is set (arXiv 2203.05482)."""
    scale = total_of(weights) if normalize else 1.0
    for _, targets in slices:
        yield combined(targets, [weight / scale for weight in weights])


@METHODS.register("task_arithmetic", "pivot + scale x weighted sum of deltas", needs=("weights",))
def task_arithmetic(slices: Slices, weights: Weights, scale: float = 1.0, normalize: bool = True) -> Parts:
    """θ = θ_0 + scale · Σ_j w_j δ_j (arXiv 2212.04089), as a weighted sum of pivot and targets."""
    factor = scale / (total_of(weights) if normalize else 1.0)
    own = 1 - factor * sum(weights)
    for pivot, targets in slices:
        yield combined([pivot, *targets], [own, *(factor * weight for weight in weights)])


@METHODS.register("slerp", "spherical interpolation of two targets, or a chain")
def slerp(slices: Slices, t: float = 0.5) -> Parts:
    """Spherical interpolation of two targets as vectors, from the first (t = 0) to the second.

    θ = (sin((1 − t)φ) θ_1 + sin(tφ) θ_2) / sin φ with φ the angle between them. Further targets are brought in one
    after another, each with equal say (t = 1 / its place). Every intermediate result is a combination Σ_j c_j θ_j, so
    that its norm and angles follow from the targets' scalar products, gathered in one pass.
    """
    gram = sum((_products(targets) for _, targets in slices), torch.zeros((), dtype=torch.float64))
    coefficients, *others = torch.eye(len(slices.targets), dtype=torch.float64)
    for place, other in enumerate(others, 2):
        share = t if len(slices.targets) == 2 else 1 / place
        coefficients = _between(coefficients, other, gram, share)
    yield from (combined(targets, coefficients.tolist()) for _, targets in slices)


def _between(a: Tensor, b: Tensor, gram: Tensor, t: float) -> Tensor:
    """Coefficients of the point at share ``t`` of the arc from Σ a_j θ_j to Σ b_j θ_j. gram: the θ_j's products."""
    norm_a, norm_b = (float((v @ gram @ v).clamp_min(0.0).sqrt().clamp_min(SMALLEST)) for v in (a, b))
    cosine = float(a @ gram @ b) / (norm_a * norm_b)
    if abs(cosine) > PARALLEL:
        return (1 - t) * a + t * b
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@METHODS.register("model_stock", "interpolate pivot and mean by the angle between deltas")
def model_stock(slices: Slices, filter_wise: bool = False) -> Parts:
    """Model Stock (arXiv 2403.19522): θ = s · mean_j θ_j + (1 − s) θ_0 with s = J cos φ / (1 + (J − 1) cos φ).

    cos φ is the mean cosine between two targets' deltas, over the whole tensor or, ``filter_wise``, row by row.
    """
    count = len(slices.targets)
    by_row = filter_wise and len(slices.shape) > 1
    whole = None if by_row else _stock_share(torch.stack([_delta_products(*part) for part in slices]).sum(0))
    for pivot, targets in slices.rows() if by_row else slices:
        share = _stock_share(_delta_products(pivot, targets)).unsqueeze(-1) if whole is None else whole
        yield share * combined(targets, [1 / count] * count) + (1 - share) * pivot


def _stock_share(gram: Tensor) -> Tensor:
    """s of model stock. gram: scalar products of the deltas, [J, J] or [J, J, rows] -> scalar or [rows]."""
    count = len(gram)
    norms = gram.diagonal().movedim(-1, 0).sqrt().clamp_min(SMALLEST)
    cosines = [gram[i, j] / (norms[i] * norms[j]) for i, j in combinations(range(count), 2)]
    cosine = torch.stack(cosines).mean(0)
    return (count * cosine / (1 + (count - 1) * cosine)).float()


def _products(vectors: Sequence[Tensor]) -> Tensor:
    """Scalar products of flat slices, [J, J]."""
    return torch.stack([torch.stack([a.dot(b) for b in vectors]) for a in vectors]).double()


def _delta_products(pivot: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Scalar products of the deltas along the last dimension, [J, J] or [J, J, rows]."""
    deltas = [target - pivot for target in targets]
    return torch.stack([torch.stack([(a * b).sum(-1) for b in deltas]) for a in deltas]).double()
