"""WIDEN (arXiv 2408.03092): a matrix's columns merged by how far their magnitudes and directions diverged."""

from __future__ import annotations

import torch
from torch import Tensor

from fusechat.merging.family import METHODS, Parts
from fusechat.merging.slices import Slices


@METHODS.register("widen", "magnitudes and directions by rank of divergence", needs=("transposed",))
def widen(slices: Slices, ratio: float = 1.0, calibration: float = 1.0, transposed: bool = False) -> Parts:
    """θ = θ_0 + Σ_j s_j ⊙ δ_j with scores from ranks of divergence. ratio, calibration: t and s of the paper.

    s_j = (S_m + S_D) / 2 for every column, from the ranks of |m_j − m_0| and of 1 − cos(D_j, D_0), where m is a
    column's norm and D its direction. transposed: embeddings, whose rows are the vectors. Parameters of one dimension
    are scored by |δ_j| itself.
    """
    by_row = transposed and len(slices.shape) > 1
    if len(slices.shape) < 2:
        scores = _scores_of_elements(slices, ratio, calibration)
    else:
        magnitudes, angles = _divergences(slices, 1 if by_row else 0)
        scores = (_rank_scores(magnitudes, ratio, calibration) + _rank_scores(angles, ratio, calibration)) / 2
    scores = scores.float().to(slices.device)
    row = 0
    for pivot, targets in slices.rows():
        merged = pivot.clone()
        for target, score in zip(targets, scores, strict=True):
            merged.addcmul_(target - pivot, score[row : row + len(pivot), None] if by_row else score)
        row += len(pivot)
        yield merged


def _divergences(slices: Slices, dim: int) -> tuple[Tensor, Tensor]:
    """|m_j − m_0| and 1 − cos(D_j, D_0) of every vector along ``dim``, each [J, vectors] in float64.

    Both come from the sums over w², wδ and δ² (w the pivot's vector), in forms that lose nothing where δ is small:
    m² − m_0² = 2 Σ wδ + Σ δ², and sin² of the angle = (Σ w² Σ δ² − (Σ wδ)²) / (m m_0)², which is half the squared
    distance of the two unit vectors times 1 + cos. In fp32 1 − cos itself is noise for deltas below 1e-3.
    """
    own, products, squares = _sums(slices, dim)
    norm, norms = own.sqrt(), (own + 2 * products + squares).clamp_min(0.0).sqrt()
    both = norm * norms
    magnitudes = (2 * products + squares).abs() / (norm + norms).clamp_min(torch.finfo(torch.float64).tiny)
    cosine = (own + products) / both
    sine = (own * squares - products.square()).clamp_min(0.0) / both.square()
    angles = torch.where(cosine > 0, sine / (1 + cosine), 1 - cosine)
    return magnitudes, torch.where(both > 0, angles, (norm != norms).double())  # without a length, without a direction


def _sums(slices: Slices, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Σ w² [vectors], Σ wδ_j and Σ δ_j² [J, vectors] along ``dim``: fp32 within a slice, float64 over them."""
    parts = []
    for pivot, targets in slices.rows():
        deltas = [target - pivot for target in targets]
        products = [(pivot * delta).sum(dim) for delta in deltas]
        squares = [delta.square().sum(dim) for delta in deltas]
        parts.append(torch.stack([pivot.square().sum(dim), *products, *squares]).double())
    total = torch.cat(parts, 1) if dim == 1 else torch.stack(parts).sum(0)
    total, count = total.cpu(), len(slices.targets)
    return total[0], total[1 : 1 + count], total[1 + count :]


def _rank_scores(divergences: Tensor, ratio: float, calibration: float) -> Tensor:
    """Scores of the ranks r / n of every vector among its model's, r = 0 … n − 1, ties in order. [J, n] -> [J, n].

    Softmax across models; ``calibration`` where a rank exceeds ratio · (n − 1) / 2, their mean.
    """
    count = divergences.shape[1]
    ranks = divergences.argsort(dim=1, stable=True).argsort(dim=1, stable=True).double()
    return torch.where(2 * ranks > ratio * (count - 1), calibration, torch.softmax(ranks / count, 0))


def _scores_of_elements(slices: Slices, ratio: float, calibration: float) -> Tensor:
    """Softmax of |δ_j| across models, ``calibration`` where it exceeds ratio times its model's mean. -> [J, n]."""
    divergence = torch.cat([torch.stack(deltas) for deltas in slices.deltas()], 1).abs()
    above = divergence > ratio * divergence.mean(1, keepdim=True)
    return torch.where(above, calibration, torch.softmax(divergence, 0))
