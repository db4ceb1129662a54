"""WIDEN (arXiv 2408.03092): a matrix's columns merged by how far their magnitudes and directions diverged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusechat.merging.family import METHODS, Parts
from fusechat.merging.slices import Slices


@METHODS.register("widen", "magnitudes and directions by rank of divergence", needs=("transposed", "whole"))
def widen(slices: Slices, ratio: float = 1.0, calibration: float = 1.0, transposed: bool = False) -> Parts:
    """θ = θ_0 + Σ_j s_j ⊙ δ_j with scores from ranks of divergence. ratio, calibration: t and s of the paper.

    Parameters of one dimension are scored by |δ_j| itself. transposed: embeddings, whose rows are the vectors.
    """
    pivot, *targets = slices.whole()
    deltas = [target - pivot for target in targets]
    if pivot.dim() < 2:
        divergence = torch.stack([delta.abs().reshape(-1) for delta in deltas])
        scores = [score.view_as(pivot) for score in _scores(divergence, ratio, calibration)]
    elif transposed:
        scores = [s.unsqueeze(1) for s in _matrix_scores(pivot.t(), [t.t() for t in targets], ratio, calibration)]
    else:
        scores = list(_matrix_scores(pivot, targets, ratio, calibration))
    yield pivot + torch.stack([delta * score for delta, score in zip(deltas, scores, strict=True)]).sum(0)


def _matrix_scores(pivot: Tensor, targets: Sequence[Tensor], ratio: float, calibration: float) -> Tensor:
    """s_j = (S_m + S_D) / 2 for every column, [J, C]: of the ranks of |m_j − m_0| and of 1 − cos(D_j, D_0).

    A matrix W is split into its columns' norms m and directions D = W / m.
    """
    norm, direction = _columns(pivot)
    magnitudes, angles = [], []
    for target in targets:
        own_norm, own_direction = _columns(target)
        magnitudes.append((own_norm - norm).abs())
        angles.append(1 - torch.nn.functional.cosine_similarity(own_direction, direction, dim=0))
    by_magnitude, by_direction = (
        _scores(_ranks(torch.stack(divergence)), ratio, calibration) for divergence in (magnitudes, angles)
    )
    return (by_magnitude + by_direction) / 2


def _columns(matrix: Tensor) -> tuple[Tensor, Tensor]:
    norm = matrix.norm(dim=0, keepdim=False)
    return norm, matrix / norm.clamp_min(1e-12)


def _ranks(values: Tensor) -> Tensor:
    """Position of every element among its model's, as a share: [J, C] -> [J, C], ties in order."""
    size = values.shape[1]
    order = values.sort(dim=1, stable=True).indices
    positions = torch.arange(size, dtype=values.dtype) / size
    return torch.empty_like(values).scatter_(1, order, positions.expand_as(values))


def _scores(divergence: Tensor, ratio: float, calibration: float) -> Tensor:
    """Softmax across models, ``calibration`` where a divergence exceeds ratio * its model's mean. [J, C] -> [J, C]."""
    above = divergence > ratio * divergence.mean(1, keepdim=True)
    return torch.where(above, calibration, torch.softmax(divergence, 0))
