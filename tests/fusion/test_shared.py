"""The split of GOLD and NeMo-RL: ids where both vocabularies have the token, ranks elsewhere, against what a reader
sees.
"""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.fusion.checks import check_rule
from fusechat.fusion.gradient import fused_loss, loss_from_logits
from fusechat.fusion.losses import MISSING, FusionLoss
from fusechat.fusion.rules import FusionRule
from fusechat.fusion.shared import Shared
from fusechat.fusion.targets import Targets

V, PADDED, K, N = 12, 15, 6, 23


def example(masks: Tensor) -> Targets:
    """Entries of N positions, each by one of the models: some tokens by id, others by rank, ragged, one row empty."""
    torch.manual_seed(3)
    speaker = torch.randint(len(masks), (N,))
    ids, p = torch.zeros(N, K, dtype=torch.long), torch.zeros(N, K, dtype=torch.float64)
    for n in range(1, N):
        known = masks[speaker[n]].nonzero().flatten()
        by_id = min(len(known), int(torch.randint(0, K + 1, ())))
        ranks = int(torch.randint(0, K + 1 - by_id, ()))
        chosen = torch.cat([known[torch.randperm(len(known))[:by_id]], V + torch.arange(ranks)])
        order = torch.randperm(K)[: len(chosen)]  # a rule may leave entries in any order
        ids[n, order], p[n, order] = chosen, torch.rand(len(chosen), dtype=torch.float64)
    p = p / p.sum(-1, keepdim=True).clamp_min(1e-9) * 0.9
    weights = torch.rand(2, N, dtype=torch.float64) / N
    return Targets(ids, p, torch.randint(V, (N,)), *weights, shared=Shared(masks, speaker))


def naive(z: Tensor, targets: Targets, loss: FusionLoss) -> Tensor:
    """The divergence, position by position."""
    assert targets.shared is not None
    each = []
    for n in range(len(z)):
        q, entries = (
            (z[n] / loss.student_temperature).softmax(-1),
            [*zip(targets.ids[n].tolist(), targets.p[n], strict=True)],
        )
        by_id = {i: p for i, p in entries if p > 0 and i < V}
        theirs = sorted((p for i, p in entries if p > 0 and i >= V), reverse=True)
        known = targets.shared.masks[targets.shared.speaker[n]]
        ours = sorted((q[v] for v in range(V) if not known[v] and v not in by_id), reverse=True)[:K]
        kl = sum((p * (p / q[i]).log() for i, p in by_id.items()), start=z.new_zeros(()))
        pairs = [*itertools.zip_longest(theirs, ours, fillvalue=z.new_zeros(()))]
        value = kl + sum(((p - q).abs() for p, q in pairs), start=z.new_zeros(()))
        if loss.missing_mass == "tail":
            p_rest, q_rest = 1 - targets.p[n].sum(), 1 - sum(q[i] for i in by_id) - sum(ours)
            value = value + p_rest * (p_rest / q_rest).log()
        each.append(value)
    return torch.stack(each)


def weighted(z: Tensor, targets: Targets, divergence: Tensor) -> Tensor:
    sft = torch.nn.functional.cross_entropy(z, targets.gold, reduction="none")
    return (sft * targets.sft_weight + divergence * targets.fusion_weight).sum()


MASKS = torch.stack([torch.ones(V), torch.arange(V) % 2, torch.arange(V) % 3 == 0, torch.zeros(V)]).bool()


@pytest.mark.parametrize("student_temperature", [1.0, 1.5])
@pytest.mark.parametrize(("missing", "rows"), itertools.product(MISSING, [1, 5, 1000]))
def test_value_and_gradient_equal_the_naive_split(
    missing: str, rows: int, student_temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From logits and from hidden states, whose rows beyond the vocabulary are no tokens, however many are held at a
    time.
    """
    monkeypatch.setattr("fusechat.fusion.slices.chunk_rows", lambda *_: rows)
    loss, targets = FusionLoss("hybrid", missing, student_temperature=student_temperature), example(MASKS)
    head = torch.nn.Linear(7, PADDED, bias=False).double()
    hidden = (torch.randn(N, 7, dtype=torch.float64) * 2).requires_grad_()
    logits = head(hidden).detach().requires_grad_()
    wanted = weighted(logits, targets, naive(logits, targets, loss))
    (gradient,) = torch.autograd.grad(wanted, logits)
    value, each = loss_from_logits(logits * 1.0, targets, loss)
    (ours,) = torch.autograd.grad(value, logits)
    assert value.item() == pytest.approx(wanted.item(), abs=1e-12)
    assert (ours - gradient).abs().max() < 1e-12 < 1e-3 < gradient.abs().max()
    assert (each[1] - naive(logits, targets, loss)).abs().max() < 1e-12
    stub = SimpleNamespace(projection=head, transform=lambda z: z, softcap=None, scale=1.0)
    value, _ = fused_loss(hidden, stub, targets, loss)
    found = torch.autograd.grad(value, [hidden, head.weight])
    dense = weighted(head(hidden), targets, naive(head(hidden), targets, loss))
    reference = torch.autograd.grad(dense, [hidden, head.weight])
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(found, reference, strict=True))


def test_whole_distributions_give_the_published_loss() -> None:
    """GOLD at beta 0 and weights 1, over complete vocabularies: KL over the matched ids, sorted L1 over all others."""
    torch.manual_seed(0)
    matched, theirs = torch.tensor([1, 4, 5, 9]), 9  # of 12 tokens here and 9 there; theirs[:4] are the matched
    z, teacher = torch.randn(N, V, dtype=torch.float64), torch.randn(N, theirs, dtype=torch.float64).softmax(-1)
    mask = torch.zeros(1, V, dtype=torch.bool)
    mask[0, matched] = True
    ids = torch.cat([matched, V + torch.arange(theirs - 4)]).expand(N, -1)
    zeros = torch.zeros(N, dtype=torch.long)
    weights = torch.zeros(N).double(), torch.ones(N).double()
    targets = Targets(ids, teacher, zeros, *weights, shared=Shared(mask, zeros))
    leaf, ours = z.clone().requires_grad_(), z.clone().requires_grad_()
    q = leaf.softmax(-1)
    kl = (teacher[:, :4] * (teacher[:, :4] / q[:, matched]).log()).sum()
    student = q[:, ~mask[0]].sort(-1, descending=True).values
    rest = torch.nn.functional.pad(teacher[:, 4:].sort(-1, descending=True).values, (0, 3))
    wanted = kl + (student - rest).abs().sum()
    wanted.backward()
    value, _ = loss_from_logits(ours * 1.0, targets, FusionLoss("hybrid"))
    value.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert (ours.grad - leaf.grad).abs().max() < 1e-12 < leaf.grad.abs().max()


@pytest.mark.parametrize("missing", MISSING)
def test_one_vocabulary_is_the_divergence_by_ids(missing: str) -> None:
    targets, z = example(MASKS[:1]), torch.randn(N, V).double()
    plain = replace(targets, ids=targets.ids.clamp_max(V - 1), p=targets.p * (targets.ids < V), shared=None)
    targets = replace(plain, shared=targets.shared)
    found, wanted = (loss_from_logits(z.clone(), *each) for each in both(targets, plain, "forward_kl", missing))
    assert torch.allclose(found[1], wanted[1], atol=1e-12) and wanted[1][1].abs().max() > 0.1


@pytest.mark.parametrize("missing", ["renormalize", "zero"])
def test_nothing_in_common_is_the_distance_by_ranks(missing: str) -> None:
    targets, z = example(MASKS[3:]), torch.randn(N, V).double()
    found, wanted = (loss_from_logits(z.clone(), *each) for each in both(targets, targets, "uld", missing))
    assert (targets.ids[targets.p > 0] >= V).all()
    assert torch.allclose(found[1], wanted[1], atol=1e-12) and wanted[1][1].abs().max() > 0.1


def both(split: Targets, plain: Targets, kind: str, missing: str) -> list[tuple[Targets, FusionLoss]]:
    return [(split, FusionLoss("hybrid", missing)), (plain, FusionLoss(kind, missing))]


@pytest.mark.parametrize("rule", [{"rule": "avg_ce"}, {"empty": "pivot"}])
def test_tokens_are_those_of_one_model(rule: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"loss.kind=hybrid compares by id .* set fusion=min_ce fusion.empty=skip"):
        check_rule(FusionRule(**rule), FusionLoss("hybrid"))
    check_rule(FusionRule(level="token"), FusionLoss("hybrid"))
    check_rule(FusionRule("sft", empty="pivot"), FusionLoss("hybrid"))
