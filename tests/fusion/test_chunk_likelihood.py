"""Approximate likelihood matching: the loss of chunks of text, whatever tokens they are made of."""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.fusion.checks import check_rule
from fusechat.fusion.gradient import fused_loss, loss_from_logits
from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.rules import FusionRule
from fusechat.fusion.targets import Targets
from tests.fusion.dense import in_float64


def chunked_example(n: int, v: int, temperature: float) -> tuple[Tensor, Targets, list[range], list[float]]:
    """Logits and chunks of 1 to 4 positions, one of which has no source; the chunks with the source's nats."""
    torch.manual_seed(1)
    sizes = [1, 3, 1, 2, 4]
    starts = np.cumsum([0, *itertools.islice(itertools.cycle(sizes), n)])
    spans = [range(a, min(b, n)) for a, b in itertools.pairwise(starts.tolist()) if a < n]
    nats, gold = (torch.rand(len(spans)) * 4 + 0.1).tolist(), torch.randint(0, v, (n,))
    chunk, p, weight = torch.empty(n, dtype=torch.long), torch.empty(n, 1), torch.zeros(n)
    for number, (span, spent) in enumerate(zip(spans, nats, strict=True)):
        chunk[span.start : span.stop], p[span.start : span.stop] = 3 * number, float(np.exp(-spent / temperature))
        weight[span.stop - 1] = 0.0 if number == 2 else 0.3
    return torch.randn(n, v), Targets(gold.unsqueeze(1), p, gold, torch.rand(n) / n, weight, chunk), spans, nats


def naive_alm(logits: Tensor, targets: Targets, spans: list[range], nats: list[float], temperature: float) -> Tensor:
    """As published, chunk by chunk."""
    log_q, total = logits.log_softmax(-1), logits.new_zeros(())
    for span, spent in zip(spans, nats, strict=True):
        a = torch.tensor(-spent / temperature - 1e-6, dtype=logits.dtype)
        b = sum(log_q[n, targets.gold[n]] for n in span) / temperature - 1e-6
        bce = -(a.exp() * b + (1 - a.exp()) * torch.log(1 - torch.exp(b)))
        total = total + targets.fusion_weight[span.stop - 1] * bce
    return total - (log_q[torch.arange(len(logits)), targets.gold] * targets.sft_weight).sum()


@pytest.mark.parametrize("temperature", [1.0, 5.0])
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_chunk_likelihood_equals_the_published_formula(
    temperature: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few rows of logits are held at a time: chunks are never torn; from logits and from hidden states."""
    monkeypatch.setattr("fusechat.fusion.slices.chunk_rows", lambda *_: rows)
    loss = FusionLoss("alm", temperature=temperature)
    logits, raw, spans, nats = chunked_example(23, 11, temperature)
    leaf, targets = logits.double().requires_grad_(), in_float64(raw)
    exact = torch.tensor([-spent / temperature for spent in nats], dtype=torch.float64).exp()
    targets = replace(targets, p=exact[targets.chunk // 3].unsqueeze(1))
    wanted = naive_alm(leaf, targets, spans, nats, temperature)
    (gradient,) = torch.autograd.grad(wanted, leaf)
    ours = logits.double().requires_grad_()
    value, each = loss_from_logits(ours * 1.0, targets, loss)
    value.backward()
    assert value.item() == pytest.approx(wanted.item(), abs=1e-11)
    assert (ours.grad - gradient).abs().max() < 1e-11 < gradient.abs().max()
    assert each.shape == (2, 23)
    head = torch.nn.Linear(7, 11, bias=False).double()
    hidden = torch.randn(23, 7, dtype=torch.float64, requires_grad=True)
    stub = SimpleNamespace(projection=head, transform=lambda z: z, softcap=None, scale=1.0)
    value, _ = fused_loss(hidden, stub, targets, loss)
    found = torch.autograd.grad(value, [hidden, head.weight])
    reference = torch.autograd.grad(naive_alm(head(hidden), targets, spans, nats, temperature), [hidden, head.weight])
    assert all((a - b).abs().max() < 1e-11 for a, b in zip(found, reference, strict=True))


def test_chunk_likelihood_passes_gradcheck() -> None:
    loss, p = FusionLoss("alm", temperature=2.0), torch.rand(9, 1, dtype=torch.float64)
    log_q = (torch.rand(9, 1, dtype=torch.float64) * -5 - 0.01).requires_grad_()  # either branch of log(1 - q)
    assert torch.autograd.gradcheck(lambda x: loss.divergence(p, x), (log_q,))


def test_chunk_likelihood_is_least_where_the_student_agrees() -> None:
    loss, p = FusionLoss("alm"), torch.tensor([[0.25], [1.0], [1e-30], [0.0]])
    log_q = torch.tensor([0.25, 1.0, 1e-30, 1e-30]).log().unsqueeze(1).requires_grad_()
    divergence = loss.divergence(p, log_q)
    (slope,) = torch.autograd.grad(divergence.sum(), log_q)
    assert divergence.isfinite().all() and slope.isfinite().all()
    assert slope[0].abs() < 1e-5 < (loss.divergence(p, torch.tensor([[0.5]]).log())[0] - divergence[0]).abs()


def test_chunk_likelihood_has_one_temperature() -> None:
    with pytest.raises(
        UserError, match=r"student_temperature=2.0: loss.kind=alm takes loss.temperature for both sides"
    ):
        FusionLoss("alm", student_temperature=2.0)


@pytest.mark.parametrize("rule", [{"rule": "avg_ce"}, {"level": "token"}])
def test_chunks_are_of_one_model(rule: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"loss.kind=alm compares chunks of text, .* set fusion=min_ce fusion.level="):
        check_rule(FusionRule(**rule), FusionLoss("alm"))
    check_rule(FusionRule(), FusionLoss("alm"))
    check_rule(FusionRule("sft", level="token"), FusionLoss("alm"))
