"""Fusion loss and backward against the dense formulation of the published trainers: 4 x 512 tokens, V 32,000, k 10, D
512.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from fusechat.fusion.gradient import fused_loss, loss_from_logits
from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.targets import Targets
from tests.benchmarks.measure import measure, table

V, K, D = 32_000, 10, 512


def targets(n: int) -> tuple[Targets, Tensor]:
    """Random sparse targets and their log-probabilities."""
    logprobs, ids = torch.randn(n, K).log_softmax(-1), torch.randint(0, V, (n, K))
    gold, weight = torch.randint(0, V, (n,)), torch.full((n,), 0.5 / n)
    return Targets(ids, logprobs.exp(), gold, weight, weight), logprobs


def dense_targets(t: Targets) -> Tensor:
    """What a dense collator hands over for one model: a bf16 tensor over the vocabulary."""
    return torch.zeros(len(t.gold), V, dtype=torch.bfloat16).scatter_(1, t.ids, t.p.bfloat16())


def dense(logits: Tensor, t: Targets) -> Tensor:
    """The published formulation: two models' dense targets, the better one of each chat chosen, soft cross entropy; and
    shifted SFT.
    """
    logits = logits.view(4, -1, V)
    pivot, source = (dense_targets(t).view_as(logits) for _ in range(2))
    better = (torch.arange(4) % 2 == 0).view(4, 1, 1).expand_as(pivot)
    chosen = torch.where(better, pivot, source).view(-1, V)
    fusion = torch.nn.functional.cross_entropy(logits.view(-1, V), chosen, reduction="none")
    shifted, labels = logits[:, :-1].contiguous(), t.gold.view(4, -1)[:, 1:]
    return 0.5 * torch.nn.functional.cross_entropy(shifted.view(-1, V), labels.reshape(-1)) + 0.5 * fusion.mean()


def with_head(tokens: int) -> list[list[object]]:
    """Ours against dense, lm_head included."""
    n = 4 * tokens
    t, _ = targets(n)
    hidden = torch.randn(n, D, requires_grad=True)
    linear = torch.nn.Linear(D, V, bias=False)
    head = SimpleNamespace(projection=linear, transform=lambda z: z, softcap=None, scale=1.0)

    def clear() -> None:
        hidden.grad = linear.weight.grad = None

    def ours() -> None:
        fused_loss(hidden, head, t, FusionLoss())[0].backward()

    def released() -> None:
        dense(linear(hidden), t).backward()

    def products() -> None:
        linear(hidden).backward(gradient)

    found = [["fused, with lm_head", tokens, measure(ours, clear)]]
    if tokens <= 512:
        found.append(["dense as published, with lm_head", tokens, measure(released, clear)])
        gradient = torch.randn(n, V)
        found.append(["the three matrix products of lm_head alone", tokens, measure(products, clear)])
    return found


def without_head(tokens: int) -> list[list[object]]:
    """Ours against dense, from logits that are there already (ours turns them into their gradient in place)."""
    n = 4 * tokens
    t, _ = targets(n)
    logits = torch.randn(n, V)

    def ours() -> None:
        leaf = logits.requires_grad_()
        value, _ = loss_from_logits(leaf, t, FusionLoss())
        torch.autograd.grad(value, leaf)

    def released() -> None:
        leaf = logits.detach().requires_grad_()
        torch.autograd.grad(dense(leaf, t), leaf)

    found = [["fused, from logits", tokens, measure(ours, dict)]]
    if tokens <= 512:
        found.append(["dense as published, from logits", tokens, measure(released, dict)])
    return found


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    rows = [*with_head(512), *without_head(512), *with_head(2048), *without_head(2048)]
    table(
        "fusion loss + backward, fp32, one thread",
        ["what", "tokens x 4", "CPU s", "peak MB"],
        [[w, n, c.seconds, c.megabytes] for w, n, c in rows],
    )


if __name__ == "__main__":
    main()
