"""Products of matrices in mixed precision: of rounded operands, exact in fp32, and summed and kept there.

h, W and ∂L/∂z are rounded to autocast's dtype, as torch's own linear layer would; logits, ∂L/∂h and, over all chunks,
∂L/∂W are in fp32, on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 14  # rows of ∂L/∂W in one product on a card: it lies in memory in fp32 before it is added


def at_least_fp32(tensor: Tensor) -> torch.dtype:
    """The tensor's dtype, or fp32 where that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """What a linear layer would compute in: autocast's dtype where it is on, which an outer autocast block decides."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def operand(tensor: Tensor, compute: torch.dtype) -> Tensor:
    """Rounded to ``compute``; on a CPU held in fp32 at least, where matrix products sum in the dtype they return."""
    rounded = tensor.to(compute)
    return rounded if tensor.is_cuda else rounded.to(torch.promote_types(compute, torch.float32))


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out = left @ right, summed in fp32 at least."""
    if left.dtype == out.dtype and not left.is_cuda:
        return torch.mm(left, right, out=out)
    return out.copy_(_summed(left, right))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in the total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        for part, rows in zip(torch.split(total, BLOCK), torch.split(left, BLOCK), strict=True):
            part += _summed(rows, right)


def _summed(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32 at least; on a GPU operands of lower precision go to its tensor cores as they are."""
    exact = at_least_fp32(left)
    return left @ right if left.dtype == exact else torch.mm(left, right, out_dtype=exact)
