"""The sparse losses: a naive dense reference for every option, a user's own, rows without entries."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.app.registry import choices
from fusechat.fusion.gradient import loss_from_logits
from fusechat.fusion.losses import LOSSES, MISSING, FusionLoss
from fusechat.fusion.rules import RULES
from fusechat.fusion.targets import Targets
from tests.fusion.dense import dense, example, in_float64

OF_TOKENS = sorted(name for name, member in LOSSES.items() if "chunks" not in member.needs)


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 1.5)])
@pytest.mark.parametrize(("kind", "missing"), itertools.product(OF_TOKENS, MISSING))
def test_loss_and_gradient_equal_the_dense_reference(
    kind: str, missing: str, temperatures: tuple[float, float]
) -> None:
    loss = FusionLoss(kind, missing, *temperatures)
    logits, logprobs, raw = example(40, 60, 6)
    logits, logprobs = logits.double(), logprobs.double()
    targets = in_float64(replace(raw, p=loss.teacher(logprobs)))
    leaf = logits.clone().requires_grad_()
    sft = torch.nn.functional.cross_entropy(leaf, targets.gold, reduction="none")
    wanted = (sft * targets.sft_weight + dense(leaf, logprobs, targets, loss) * targets.fusion_weight).sum()
    wanted.backward()
    ours = logits.clone().requires_grad_()
    value, each = loss_from_logits(ours * 1.0, targets, loss)
    value.backward()
    assert value.item() == pytest.approx(wanted.item(), abs=1e-12)
    assert torch.allclose(each[0], sft, atol=1e-12)
    assert (ours.grad - leaf.grad).abs().max() < 1e-12
    assert leaf.grad.abs().max() > 1e-3
    with torch.no_grad():
        assert loss_from_logits(logits.clone(), targets, loss)[0] == value
    in_fp32, _ = loss_from_logits(logits.float(), replace(raw, p=loss.teacher(logprobs).float()), loss)
    assert in_fp32.dtype == torch.float32
    assert in_fp32.item() == pytest.approx(wanted.item(), abs=1e-4)


def alpha(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Alpha divergence at 1/2, as a user would write it: 4 (1 - sum sqrt(p q))."""
    return 4 * (1 - (0.5 * (log_p + log_q)).exp().sum(-1))


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("student_temperature", [1.0, 2.0])
def test_a_loss_of_the_users_own_trains_through_autograd(
    missing: str, student_temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOSSES, "_members", dict(LOSSES._members))
    LOSSES.register("alpha", "alpha divergence at 1/2")(alpha)
    loss = FusionLoss("alpha", missing, student_temperature=student_temperature)
    logits, logprobs, raw = example(7, 12, 4)
    logits, targets = logits.double(), in_float64(replace(raw, p=loss.teacher(logprobs.double())))

    def naive(z: Tensor) -> Tensor:
        q = (z / student_temperature).softmax(-1).gather(1, targets.ids)
        p, q = (targets.p, torch.where(targets.p > 0, q, 0.0))
        if missing == "tail":
            p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], 1) for x in (p, q))
        safe = torch.where(p > 0, p * q, 1.0)
        divergence = 4 * (1 - torch.where(p > 0, safe.sqrt(), 0.0).sum(-1))
        sft = torch.nn.functional.cross_entropy(z, targets.gold, reduction="none")
        return (sft * targets.sft_weight + divergence * targets.fusion_weight).sum()

    ours = lambda z: loss_from_logits(z * 1.0, targets, loss)[0]
    leaf, reference = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    log_q = (logits / student_temperature).log_softmax(-1).gather(1, targets.ids).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss.divergence(targets.p, x), (log_q,))
    assert ours(leaf).item() == pytest.approx(naive(reference).item(), abs=1e-12)
    (ours_gradient,) = torch.autograd.grad(ours(leaf), leaf)
    (wanted,) = torch.autograd.grad(naive(reference), reference)
    assert (ours_gradient - wanted).abs().max() < 1e-12
    assert (wanted - torch.autograd.grad(ours(reference), reference)[0]).abs().max() < 1e-12


def test_ranked_losses_sort_what_a_rule_has_mixed() -> None:
    loss = FusionLoss("uld")
    logits, logprobs, raw = example(9, 20, 5)
    targets, order = replace(raw, p=loss.teacher(logprobs)), torch.tensor([3, 0, 4, 1, 2])
    mixed = replace(targets, ids=targets.ids[:, order], p=targets.p[:, order])
    assert torch.equal(*(loss_from_logits(logits.clone(), t, loss)[0] for t in (targets, mixed)))


def test_groups_list_the_families() -> None:
    for family, group in ((LOSSES, "loss.kind"), (RULES, "fusion.rule")):
        assert choices(group) == {name: member.help for name, member in family.items()}


def test_rows_without_entries_have_no_fusion_gradient() -> None:
    loss = FusionLoss()
    logits = torch.randn(3, 10, requires_grad=True)
    p = loss.teacher(torch.full((3, 4), -torch.inf))
    value, _ = loss_from_logits(
        logits * 1.0,
        Targets(
            torch.zeros(3, 4, dtype=torch.long), p, torch.zeros(3, dtype=torch.long), torch.zeros(3), torch.ones(3)
        ),
        loss,
    )
    value.backward()
    assert value.item() == 0
    assert logits.grad.abs().max() == 0


def test_unknown_names() -> None:
    with pytest.raises(
        UserError,
        match=r"loss\.kind='mse' is unknown; use one of: alm, ce, forward_kl, hybrid, jsd, reverse_kl, standardized_uld, uld",
    ):
        FusionLoss("mse")
    with pytest.raises(UserError, match=r"loss\.missing_mass='drop' is unknown"):
        FusionLoss("ce", "drop")
