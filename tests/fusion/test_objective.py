"""The objective that is trained is the papers': against naive formulas."""

import itertools

import numpy as np
import pytest
import torch

from fusechat.app.errors import UserError
from fusechat.fusion import FusionLoss, FusionRule
from fusechat.fusion.batches import FusionBatch, FusionRows
from fusechat.fusion.inputs import open_stores
from fusechat.fusion.module import FusionModule
from fusechat.fusion.plan import Draw
from tests.conftest import Mini
from tests.fusion.trained import module_of, moved, rows_of


def naive(module: FusionModule, batch: FusionBatch) -> torch.Tensor:
    """L of a batch by the paper's equations, one position at a time, with MinCE over the sequence."""
    logits = module.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    ce, total = batch.nats / batch.n_bytes, torch.tensor(0.0)
    for n, place in enumerate(batch.at.tolist()):
        best = int(ce[batch.sequence[n]].argmin())
        log_q, logprobs = logits[place].log_softmax(-1), batch.logprobs[best, n]
        lam = module.loss.lm_weight if (logprobs > -torch.inf).any() else 1.0
        total = total - lam * log_q[batch.gold[n]]
        if lam < 1:
            p = logprobs.softmax(-1)
            total = total - (1 - lam) * (p * log_q[batch.ids[best, n].long()]).sum()
    return total / batch.step_tokens


def test_the_loss_is_the_papers(mini: Mini) -> None:
    module, rows = module_of(mini, FusionLoss(lm_weight=0.3)), rows_of(mini)
    torch.nn.init.normal_(module.model.lm_head.weight)  # hardly trained, it gives every token the same probability
    chats = [*range(24)]
    batch = rows[Draw(chats, int(rows.scalars["tokens"][chats, 0].sum()))]
    wanted = naive(module, batch)
    total, *_ = module._losses(batch)
    assert total.item() == pytest.approx(wanted.item(), rel=1e-4)
    module.loss = FusionLoss(lm_weight=0.9)
    assert total.item() != pytest.approx(naive(module, batch).item(), rel=1e-3)


def test_lambda_is_one_where_there_is_nothing_to_fuse(mini: Mini) -> None:
    """Positions without a distribution learn from their token at full weight; the others share as lambda says."""
    module, rows = module_of(mini, FusionLoss(lm_weight=0.3), FusionRule(include_pivot=False)), rows_of(mini)
    batch = rows[Draw([0, 5, 11], 1)]
    targets, _ = module.targets(batch)
    fused = (targets.p > 0).any(-1)
    assert fused.any()
    assert not fused.all()
    assert torch.allclose(targets.sft_weight, torch.where(fused, 0.3, 1.0))
    assert torch.allclose(targets.sft_weight + targets.fusion_weight, torch.ones(len(fused)))


def test_chunk_likelihood_compares_each_chunk_of_the_chosen_models_text(mini: Mini) -> None:
    """Weighted loss, from hidden states, against a walk over both stores' places; outside all chunks lambda is 1."""
    stores = open_stores(mini.experiment / "distributions/pivot", [mini.experiment / "aligned/a"])
    rows, drawn = FusionRows(stores, 0, chunked=True), [0, 3, 5]
    batch = rows[Draw(drawn, 1)]
    loss, rule = FusionLoss("alm", lm_weight=0.25, temperature=2.0), FusionRule(include_pivot=False)
    module = module_of(mini, loss, rule)
    with torch.no_grad():
        logits = module.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)[
            batch.at
        ]
        log_q = logits.log_softmax(-1).gather(1, batch.gold.unsqueeze(1)).squeeze(1).double()
        total, _, _, _ = module._losses(batch)
    wanted, start, chunks = 0.0, 0, 0
    for row in drawn:
        (spent,) = stores[1].row(row, "spent")
        shared, n = np.flatnonzero(np.isfinite(spent)), len(spent) - 1
        covered = np.zeros(n, bool)
        for begin, end in itertools.pairwise(shared.tolist()):
            a, b = -float(spent[end]) / 2 - 1e-6, float(log_q[start + begin : start + end].sum()) / 2 - 1e-6
            wanted += 0.75 * -(np.exp(a) * b + (1 - np.exp(a)) * np.log(1 - np.exp(b)))
            covered[begin:end] = True
            chunks += 1
        sft = -log_q[start : start + n].numpy()
        wanted += float((sft * np.where(covered, 0.25, 1.0)).sum())
        start += n
    assert chunks > 10
    assert total.item() == pytest.approx(wanted, rel=1e-4)


def test_chunk_likelihood_trains_a_target(fresh: Mini) -> None:
    fresh.run("train", "source=a", "loss=alm", "run_name=alm")
    assert moved(fresh, "alm") > 1e-4
    with pytest.raises(
        UserError, match=r"loss.kind=alm compares chunks of text, .*set fusion=min_ce fusion.level=sequence"
    ):
        fresh.run("train", "source=a", "loss=alm", "fusion=avg_ce", "run_name=mixed")
    assert not (fresh.experiment / "targets/mixed").exists()
