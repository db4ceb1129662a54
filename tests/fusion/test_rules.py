"""Fusion rules by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusechat.app.errors import UserError
from fusechat.fusion.rules import RULES, FusionRule, cross_entropy

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


def naive_dual(ce: list[float]) -> list[float]:
    """FedMKT's choice for one text: the best sender where it beats the receiver, else nobody."""
    own, *senders = ce
    if not any(sender < own for sender in senders):
        return [0.0] * len(ce)
    return [float(place == 1 + senders.index(min(senders))) for place in range(len(ce))]


@given(st.lists(st.lists(st.sampled_from([0.1, 0.5, 0.7, float("inf")]), min_size=3, max_size=3), min_size=1))
def test_dual_min_ce_is_the_best_sender_where_it_beats_the_receiver(rows: list[list[float]]) -> None:
    weight = RULES["dual_min_ce"].function(torch.tensor(rows))
    assert weight.tolist() == [naive_dual(torch.tensor(row).tolist()) for row in rows]


@given(st.lists(st.floats(0, 10, width=32), min_size=2, max_size=6))
def test_dual_min_ce_takes_nobody_who_is_not_strictly_below_the_receiver(ce: list[float]) -> None:
    (weight,) = RULES["dual_min_ce"].function(torch.tensor([ce])).tolist()
    assert weight[0] == 0 and sum(weight) <= 1
    assert all(ce[place] < ce[0] and ce[place] == min(ce[1:]) for place in range(len(ce)) if weight[place])


def test_dual_min_ce_fuses_nothing_where_nobody_is_better() -> None:
    for ce, fused_p in (([0.5, 0.5], torch.zeros(2, 2)), ([1.0, 0.5], P[1])):
        fused = FusionRule("dual_min_ce")(IDS, P, GOLD, torch.tensor([ce]), SEQUENCE, PIVOT)
        assert torch.equal(fused.p, fused_p)
    released = FusionRule("dual_min_ce", empty="pivot")  # its own distribution instead
    assert torch.equal(released(IDS, P, GOLD, torch.tensor([[0.5, 0.5]]), SEQUENCE, PIVOT).p, P[0])


def test_dual_min_ce_needs_the_receiver() -> None:
    with pytest.raises(
        UserError, match=r"fusion=dual_min_ce compares with the pivot itself; set fusion\.include_pivot"
    ):
        FusionRule("dual_min_ce", include_pivot=False)


def test_cross_entropy_of_no_text_is_infinite() -> None:
    assert cross_entropy(torch.tensor([6.0, 1.0]), torch.tensor([3.0, 0.0])).tolist() == [2.0, float("inf")]


def test_unknown_rule() -> None:
    with pytest.raises(
        UserError, match=r"fusion\.rule='best' is unknown; use one of: avg_ce, dual_min_ce, min_ce, sft"
    ):
        FusionRule("best")
