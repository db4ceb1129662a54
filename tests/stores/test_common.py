"""The text that all models predict: random tokenizations of one text against sets of places; half precision on disk."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusechat.fusion.batches import FusionRows
from fusechat.fusion.plan import Draw
from fusechat.fusion.rules import cross_entropy
from fusechat.stores.common import chunks, compared, same_range, spent
from fusechat.stores.store import DistributionStore
from tests.conftest import Mini


@dataclass
class Read:
    """A chat as one model reads it: places [N + 1], positions [N], -log p of each token, bytes that it predicts."""

    places: np.ndarray
    positions: np.ndarray
    nats: np.ndarray
    n_bytes: int


@st.composite
def reading(draw: Any, turns: list[int]) -> Read:
    """Two turns of so many bytes, cut into tokens anywhere, maybe begun late and ended early."""
    places, positions, start, at = [], [], 0, 5
    for length in turns:
        inner = sorted(draw(st.sets(st.integers(1, length - 1), max_size=length - 1)) if length > 1 else [])
        places += [start, *(start + i for i in inner), start + length]  # the last token closes the turn
        positions += range(at, at + len(inner) + 2)
        start, at = start + length + 1, positions[-1] + 7
    whole = [*places, start]
    first = draw(st.sampled_from([0, 0, 0, 1]))
    last = draw(st.sampled_from([len(places), len(places), draw(st.integers(first + 1, len(places)))]))
    kept = np.array(whole[first : last + 1])
    hidden = draw(st.lists(st.booleans(), min_size=len(kept), max_size=len(kept)))
    ended = sum(turn_end < kept[-1] for turn_end in np.cumsum(np.array(turns) + 1) - 1)
    begun = sum(turn_end < kept[0] for turn_end in np.cumsum(np.array(turns) + 1) - 1)
    size = int(kept[-1] - kept[0] - (ended - begun))
    nats = np.array(draw(st.lists(st.integers(0, 64), min_size=last - first, max_size=last - first)), float) / 8
    masked = np.where([h and 0 < i < len(kept) - 1 for i, h in enumerate(hidden)], -1, kept)
    return Read(masked, np.array(positions[first:last]), nats, size)


def test_chunks_lie_between_shared_places() -> None:
    """Pivot places 0 2 3 6 8 9, source places 2 6 8: two chunks, [2, 6) with 3 nats and [6, 8) with 1."""
    of = spent(np.array([0, 2, 3, 6, 8, 9]), np.array([2, 5, 6, 8]), -np.array([1.0, 2.0, 1.0])).astype(float)
    number, nats = chunks(of)
    assert number.tolist() == [0, 1, 1, 2, 3]
    assert nats.tolist() == [np.inf, 3, 3, 1, np.inf]
    number, nats = chunks(np.full(3, np.nan))
    assert nats.tolist() == [np.inf, np.inf]


@settings(max_examples=150)
@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 3))
def test_all_models_are_compared_over_the_same_characters(data: Any, turns: list[int], sources: int) -> None:
    models = [data.draw(reading(turns)) for _ in range(1 + sources)]
    pivot = models[0]
    each = np.stack([spent(pivot.places, m.places, -m.nats) for m in models]).astype(float)
    found, size = compared(pivot.places, pivot.positions, pivot.n_bytes, each)
    known = [set(m.places[m.places >= 0].tolist()) for m in models]
    speaks = [len(known[0] & k) > 1 for k in known]
    shared = set.intersection(*(k for k, s in zip(known, speaks, strict=True) if s)) if any(speaks) else set()
    if len(shared) < 2:
        assert size == 0
        assert np.isinf(found).all()
        return
    begin, end = min(shared), max(shared)
    text = [
        place
        for start, length in zip(np.cumsum([0, *turns]) + np.arange(len(turns) + 1), turns, strict=False)
        for place in range(start, start + length)
    ]  # the place before each byte
    assert size == sum(begin <= place < end for place in text)
    for m, total, spoke in zip(models, found, speaks, strict=True):
        at = m.places.copy()
        for i in range(1, len(at)):  # a token that begins inside a character belongs to the place before
            at[i] = at[i] if at[i] >= 0 else at[i - 1]
        wanted = sum(nats for place, nats in zip(at[:-1], m.nats, strict=True) if begin <= place < end)
        assert total == (pytest.approx(wanted) if spoke else np.inf)


def test_totals_are_compared_where_nothing_is_cut() -> None:
    whole, other = np.array([0, 3, 7, 8]), np.array([0, 7, 8])
    assert same_range(whole, other)
    assert not same_range(whole, np.array([0, 3, 7]))
    assert not same_range(whole[1:], other)
    assert not same_range(np.array([0, 3, -1]), np.array([0, 3, -1])), "cut inside a character, not known where"


def cut_at(world: Mini, length: int, *sources: str) -> list[DistributionStore]:
    """Stores of chats cut at so many tokens of each model's own."""
    for source in ("pivot", *sources):
        world.run("extract", f"source={source}", f"chat.max_length={length}", "overwrite=true")
    for source in sources:
        world.run("align", f"source={source}", "overwrite=true")
    paths = ["distributions/pivot", *(f"aligned/{source}" for source in sources)]
    return [DistributionStore(world.experiment / path) for path in paths]


def test_cut_chats_meet_over_what_all_have_read(fresh: Mini) -> None:
    """Each model's own tokens, summed by hand from its own store up to the last place that all share."""
    names = ("a", "b")
    stores = cut_at(fresh, 22, *names)
    own = [stores[0], *(DistributionStore(fresh.experiment / "distributions" / name) for name in names)]
    rows = FusionRows(stores, 0)
    assert 0 < rows.common.whole.sum() < len(stores[0]), "some chats are cut, some are not"
    seen = 0
    for row in np.flatnonzero(~rows.common.whole).tolist():
        if not rows.scalars["tokens"][row].all():
            continue
        places = [np.append(store.row(row, "boundaries")[0], store.ends[row]) for store in own]
        shared = set.intersection(*(set(p[p >= 0].tolist()) for p in places))
        if len(shared) < 2:
            continue
        batch = rows[Draw([row], 1)]
        for s, (store, place) in enumerate(zip(own, places, strict=True)):
            index, gold = place.tolist(), -store.row(row, "gold_logprob")[0].astype(float)
            wanted = gold[index.index(min(shared)) : index.index(max(shared))].sum()
            assert batch.common_nats[0, s].item() == pytest.approx(wanted, rel=2e-3, abs=2e-3)  # halves of 11 bits
        assert batch.common_bytes[0, 0] == max(shared) - min(shared), "one turn, and not its end"
        assert batch.common_bytes[0, 0] <= batch.n_bytes[0].min()
        seen += 1
    assert seen > 5


def test_a_model_is_not_chosen_for_reading_less(fresh: Mini) -> None:
    """A source that is the pivot, cut earlier: over the same text they tie, though their totals differ."""
    fresh.run("extract", "source=a", "source.path=${pivot.path}", "chat.max_length=14", "overwrite=true")
    fresh.run("align", "source=a", "overwrite=true")
    rows = FusionRows([DistributionStore(fresh.experiment / p) for p in ("distributions/pivot", "aligned/a")], 0)
    cut = np.flatnonzero(~rows.common.whole & (rows.scalars["tokens"][:, 1].numpy() > 1))
    batch = rows[Draw(cut.tolist(), 1)]
    ce = cross_entropy(batch.common_nats, batch.common_bytes)
    known = ce.isfinite().all(1)
    assert known.sum() > 5
    assert (batch.nats[known, 0] > batch.nats[known, 1] * 1.05).all()
    assert ((ce[known, 0] - ce[known, 1]).abs() < 2e-3 * ce[known, 0]).all()
