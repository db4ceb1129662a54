"""What a student is compared at where its vocabulary and the teacher's have only some tokens in common.

V tokens of the pivot. An id v < V is a token that both have; V + r is the r-th most likely of the teacher's others. The
student's others are the tokens that the teacher lacks, each by its rank too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shared:
    """masks [S, V]: the pivot's tokens that each of S models has; speaker [N]: whose distribution a position has."""

    masks: Tensor
    speaker: Tensor

    def __getitem__(self, part: slice) -> Shared:
        return Shared(self.masks, self.speaker[part])


def halves(z: Tensor, ids: Tensor, p: Tensor, shared: Shared | None) -> tuple[Tensor, Tensor, Tensor]:
    """The outcomes of a comparison that is split: ids, p, and which of them the student lacks, each [n, 2 K].

    K entries by id, then K by rank, the teacher's beside the student's. z [n, V or more]: logits; ids, p [n, K].
    shared: None where all tokens are.
    """
    known = torch.ones_like(z, dtype=torch.bool)  # by the teacher; rows beyond the vocabulary are no tokens
    by_id = p > 0
    if shared is not None:
        size = shared.masks.shape[1]
        known[:, :size] = shared.masks[shared.speaker]
        by_id = by_id & (ids < size)
    at, entry = by_id.nonzero(as_tuple=True)
    known[at, ids[at, entry]] = True  # a token that has an entry is compared once
    top = z.masked_fill(known, -torch.inf).topk(p.shape[1], -1)
    rest = p.masked_fill(by_id, 0.0).sort(dim=-1, descending=True).values
    ids = torch.cat([ids.masked_fill(~by_id, 0), top.indices], -1)
    return ids, torch.cat([p * by_id, rest], -1), torch.cat([~by_id, top.values.isinf()], -1)
