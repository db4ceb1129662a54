"""Projection against a dictionary-based reference; the chain rule by hand; mass is never invented; samples unbiased."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusechat.align.projection import Ragged, gold_path, project
from fusechat.extract.kinds import Keep, sampled, top_k
from fusechat.stores.distributions import TopK


def naive(
    source: Ragged, match: np.ndarray, table: np.ndarray, gold: np.ndarray, unmatched_gold: bool
) -> list[dict[int, float]]:
    starts = np.concatenate([[0], np.cumsum(source.counts)])
    rows = []
    for n, j in enumerate(match):
        row: dict[int, float] = {}
        if j < 0:
            rows.append({int(gold[n]): 1.0} if unmatched_gold else {})
            continue
        for e in range(starts[j], starts[j + 1]):
            target, mass = int(table[source.ids[e]]), float(np.exp(source.logprobs[e]))
            if target >= 0 and mass > 1e-6:
                row[target] = row.get(target, 0.0) + mass
        rows.append(row)
    return rows


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_projection_equals_the_naive_reference(seed: int, unmatched_gold: bool) -> None:
    rng = np.random.default_rng(seed)
    m, n, vocab = rng.integers(1, 6), rng.integers(1, 6), 8
    counts = rng.integers(0, 5, m)
    ids = np.concatenate([rng.permutation(vocab)[:c] for c in counts] + [np.empty(0, np.int64)]).astype(np.int64)
    probs = np.concatenate([rng.dirichlet(np.ones(c + 1))[:c] for c in counts if c] + [np.empty(0)])
    source = Ragged(counts, ids, np.log(probs + 1e-12).astype(np.float32), np.zeros(m, np.float32))
    match, table, gold = rng.integers(-1, m, n), rng.integers(-1, 4, vocab), rng.integers(0, 4, n)
    result = project(source, match, table, gold, np.full((n, 3), -1), 4, unmatched_gold)
    starts = np.concatenate([[0], np.cumsum(result.counts)])
    for i, wanted in enumerate(naive(source, match, table, gold, unmatched_gold)):
        part = slice(starts[i], starts[i + 1])
        found = dict(zip(result.ids[part].tolist(), np.exp(result.logprobs[part]).tolist(), strict=True))
        assert found.keys() == wanted.keys()
        assert all(abs(found[k] - wanted[k]) < 1e-5 for k in wanted)
        assert np.all(np.diff(result.logprobs[part]) <= 1e-6), "most likely first"
        if match[i] >= 0:
            assert sum(found.values()) <= 1 + 1e-5


def test_chain_rule_along_the_gold_path() -> None:
    """The pivot's one token 'abcd' is the source's 'ab' (0.5) then 'cd' (0.4): probability 0.2; the rest of 'ab' stays
    on 'ab'.
    """
    pivot, own = np.array([0, 4, 5]), np.array([0, 2, 4, 5])
    match = np.array([0, 2])
    path = gold_path(pivot, own, match, np.array([5, 6, 7]))
    assert path.tolist() == [[0, 1, 5], [2, 2, 7]]
    source = Ragged(
        np.array([2, 1, 1]),
        np.array([5, 8, 6, 7]),
        np.log(np.array([0.5, 0.3, 0.4, 0.9], np.float32)),
        np.log(np.array([0.5, 0.4, 0.9], np.float32)),
    )
    table = np.full(10, -1)
    table[[5, 8, 7]] = [1, 2, 3]
    result = project(source, match, table, np.array([0, 3]), path, 50, False)
    found = dict(zip(result.ids[:3].tolist(), np.exp(result.logprobs[:3]).round(4).tolist(), strict=True))
    assert found == pytest.approx({1: 0.3, 2: 0.3, 0: 0.2}, abs=1e-5)
    assert np.isclose(np.exp(result.gold_logprob[0]), 0.2, atol=1e-5)


def test_gold_token_that_is_not_among_the_entries_shares_the_tail() -> None:
    source = Ragged(np.array([1]), np.array([0]), np.log(np.array([0.6], np.float32)), np.zeros(1, np.float32))
    result = project(source, np.array([0]), np.array([2]), np.array([3]), np.full((1, 3), -1), 11, False)
    assert np.isclose(np.exp(result.gold_logprob[0]), 0.4 / 10)


def ragged(top: TopK) -> Ragged:
    kept = ~top.logprobs.isneginf()
    counts = kept.sum(-1).numpy()
    return Ragged(counts, top.ids[kept].numpy(), top.logprobs[kept].numpy(), top.gold_logprob.numpy())


@settings(max_examples=25)
@given(st.integers(0, 2**31 - 1), st.booleans())
def test_samples_are_unbiased_under_every_map_and_make_no_mass(seed: int, chained: bool) -> None:
    """The mean over draws of what is projected is the projection of all that the source holds.

    A position of which 4,000 independent copies are drawn from; the standard error of the mean tells how near it must
    be: five of them, over at most six tokens.
    """
    rng, copies, draws, vocab, pivot_size = np.random.default_rng(seed), 4000, 8, 6, 5
    logits = torch.from_numpy(rng.normal(size=(3, vocab)) * 1.5)  # a chain of three gold tokens
    own, table = rng.integers(0, vocab, 3), rng.integers(-1, pivot_size, vocab)
    gold = rng.integers(0, pivot_size, 1)
    path = np.array([[0, rng.integers(-1, 3), own[0]]]) if chained else np.full((1, 3), -1)
    match, exact = np.array([0]), top_k(logits, torch.from_numpy(own), Keep(vocab, vocab))
    wanted = np.zeros(pivot_size)
    whole = project(ragged(exact), match, table, gold, path, pivot_size, False)
    wanted[whole.ids] = np.exp(whole.logprobs)

    drawn = sampled(
        logits.repeat_interleave(copies, 0),
        torch.from_numpy(own).repeat_interleave(copies),
        Keep(vocab, draws=draws),
        torch.Generator().manual_seed(seed),
    )
    found = np.zeros((copies, pivot_size))
    for copy in range(copies):
        at = torch.arange(3) * copies + copy
        result = project(
            ragged(TopK(drawn.ids[at], drawn.logprobs[at], drawn.gold_logprob[at])),
            match,
            table,
            gold,
            path,
            pivot_size,
            False,
            True,
        )
        found[copy, result.ids] = np.exp(result.logprobs)
        assert np.exp(result.logprobs).sum() <= 1 + 1e-6
        if chained:
            assert result.gold_logprob[0] >= whole.gold_logprob[0] - 1e-5 or (table == gold[0]).any()
    error = found.std(0) / np.sqrt(copies)
    assert (np.abs(found.mean(0) - wanted) <= 5 * error + 1e-5).all()
