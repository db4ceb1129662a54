"""The order of chats: every chat once, the same for every sharing among ranks, and resumed where it was."""

import itertools
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fusechat.fusion.plan import Plan


def plan(rows: int, **options: Any) -> Plan:
    lengths = np.random.default_rng(0).integers(3, 40, rows)
    settings = {"batch_size": 2, "step": 4, "rank": 0, "world": 1, "seed": 0, "bucket": 4} | options
    return Plan(np.arange(rows), lengths, lengths // 2, **settings)


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_every_chat_once_and_every_rank_the_same_number(rows: int, batch: int, accumulate: int, world: int) -> None:
    step = batch * accumulate * world
    plans = [plan(rows, batch_size=batch, step=step, rank=r, world=world) for r in range(world)]
    draws = [list(p) for p in plans]
    assert {len(d) for d in draws} == {len(plans[0])}
    assert sorted(row for d in draws for draw in d for row in draw.rows) == list(range(rows))
    ends = [plans[0].micro_batches(n) for n in range(plans[0].optimizer_steps + 1)]
    assert (ends[0], ends[-1]) == (0, len(plans[0]))
    assert [plans[0].steps_done(n) for n in ends] == list(range(len(ends)))


def test_steps_do_not_depend_on_how_they_are_shared() -> None:
    steps = {}
    for batch, accumulate, world in ((8, 1, 1), (2, 4, 1), (2, 2, 2), (4, 1, 2), (1, 2, 4)):
        plans = [plan(45, batch_size=batch, step=8, rank=r, world=world) for r in range(world)]
        draws = [list(p) for p in plans]
        together = [sum((draw.rows for draw in micro), []) for micro in zip(*draws, strict=True)]
        ends = [plans[0].micro_batches(n) for n in range(plans[0].optimizer_steps + 1)]
        steps[batch, accumulate, world] = [sorted(sum(together[i:j], [])) for i, j in itertools.pairwise(ends)]
        assert ends[1] == accumulate
        tokens = {draw.step_tokens for draw in draws[0][:accumulate]}
        assert len(tokens) == 1
    assert [len(step) for step in steps[8, 1, 1]] == [8, 8, 8, 8, 8, 5]
    assert all(value == steps[8, 1, 1] for value in steps.values())


def test_a_resumed_plan_goes_on() -> None:
    whole, rest = plan(33), plan(33)
    rest.start = 3
    assert list(whole)[6:] == list(rest)
    assert list(rest) == list(plan(33)), "only the resumed epoch is cut"


def test_epochs_differ() -> None:
    first, second = plan(33), plan(33)
    second.set_epoch(1)
    assert list(first) != list(second)
