"""Batches under a budget of tokens, halved where memory runs out."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusechat.app.errors import UserError
from fusechat.extract.batches import by_token_budget
from fusechat.extract.extractor import Extractor
from fusechat.extract.summary import summary, totals
from fusechat.stores.store import DistributionStore
from tests.conftest import Mini


def tight(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[int]:
    """As if more than ``limit`` chats at a time did not fit in memory. Returns the sizes of what is tried."""
    whole, tried = Extractor._distributions, []

    def run(self: Any, rendered: Any) -> Any:
        tried.append(len(rendered))
        if len(rendered) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return whole(self, rendered)

    monkeypatch.setattr(Extractor, "_distributions", run)
    return tried


def test_out_of_memory_halves_the_batch_and_the_next_is_whole_again(
    mini: Mini, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = tight(monkeypatch, 4)
    mini.run("extract", "source=c", f"output_dir={mini.root}/tight", "extract.tokens_per_batch=256")
    reference = DistributionStore(mini.experiment / "distributions/c")
    store = DistributionStore(mini.root / "tight")
    assert np.allclose(reference.column("nats"), store.column("nats"), rtol=1e-3)
    assert max(tried[len(tried) // 2 :]) > 4, "later batches are tried whole"
    unfit = totals(store.manifest)["out_of_memory"]
    assert len(unfit) == sum(size > 4 for size in tried) > 0
    assert all(4 < tokens <= 256 for tokens in unfit), "padded tokens of what did not fit"
    assert f"{len(unfit)} batches ran in halves for want of memory" in summary(store.manifest, store.path)
    assert totals(reference.manifest)["out_of_memory"] == []


def test_a_chat_that_does_not_fit_alone_is_told(mini: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    tight(monkeypatch, 0)
    with pytest.raises(UserError, match=r"one chat of \d+ tokens does not fit in memory; lower chat\.max_length, or "):
        mini.run("extract", "source=c", f"output_dir={mini.root}/alone")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_token_budget(lengths: list[int], budget: int) -> None:
    groups = by_token_budget(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(g) == 1 or max(lengths[i] for i in g) * len(g) <= budget for g in groups)
