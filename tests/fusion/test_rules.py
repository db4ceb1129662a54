"""Fusion rules by hand."""

import pytest
import torch

from fusechat.app.errors import UserError
from fusechat.fusion.rules import FusionRule, cross_entropy

IDS = torch.tensor([[[1, 2], [3, 4]], [[2, 5], [0, 0]]])  # [S=2, N=2, K=2]; the second model is silent at position 1
P = torch.tensor([[[0.6, 0.4], [0.7, 0.3]], [[0.9, 0.1], [0.0, 0.0]]])
GOLD = torch.log(torch.tensor([[0.6, 0.7], [0.9, 1.0]]))
SEQUENCE = torch.tensor([0, 0])
PIVOT = (IDS[0], P[0])


def test_min_ce_takes_the_lowest_and_ties_go_to_the_first() -> None:
    for ce, winner in (([1.0, 0.5], 1), ([0.5, 1.0], 0), ([0.5, 0.5], 0)):
        fused = FusionRule("min_ce")(IDS, P, GOLD, torch.tensor([ce]), SEQUENCE, PIVOT)
        assert fused.weight.argmax(1).tolist() == [winner, winner]
        assert torch.equal(fused.p, P[winner])
        assert fused.reward.item() == pytest.approx(torch.exp(torch.tensor(-min(ce))).item())


def test_silent_positions_are_skipped_or_the_pivots() -> None:
    ce = torch.tensor([[1.0, 0.5]])
    assert FusionRule(empty="skip")(IDS, P, GOLD, ce, SEQUENCE, PIVOT).p[1].sum() == 0
    assert torch.equal(FusionRule(empty="pivot")(IDS, P, GOLD, ce, SEQUENCE, PIVOT).p[1], P[0, 1])


def test_token_level_compares_positions_and_passes_over_the_silent() -> None:
    fused = FusionRule("min_ce", "token")(IDS, P, GOLD, torch.tensor([[9.0, 0.1]]), SEQUENCE, PIVOT)
    assert fused.weight.argmax(1).tolist() == [1, 0]


def test_avg_ce_mixes_and_adds_equal_tokens() -> None:
    ce = torch.tensor([[0.2, 0.2]])
    fused = FusionRule("avg_ce")(IDS, P, GOLD, ce, SEQUENCE, PIVOT)
    first = dict(zip(fused.ids[0].tolist(), fused.p[0].tolist(), strict=True))
    assert first[2] == pytest.approx((0.4 + 0.9) / 2)
    assert fused.p.sum(-1).tolist() == pytest.approx([1.0, 1.0])


def test_cross_entropy_of_no_text_is_infinite() -> None:
    assert cross_entropy(torch.tensor([6.0, 1.0]), torch.tensor([3.0, 0.0])).tolist() == [2.0, float("inf")]


def test_unknown_rule() -> None:
    with pytest.raises(UserError, match=r"fusion\.rule='best' is unknown; use one of: avg_ce, min_ce, sft"):
        FusionRule("best")
