"""Extraction kinds: what each keeps, and how it draws."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusechat.app.registry import choices
from fusechat.chats.formats import load_chats
from fusechat.chats.render import ChatRenderer
from fusechat.extract.kinds import KINDS, Keep, generator_for, largest
from fusechat.stores.encoding import decode_logprobs
from fusechat.stores.store import DistributionStore
from tests.conftest import Mini


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_stores_what_it_makes_of_the_models_logits(kind: str, fresh: Mini) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fresh.run("extract", "source=a", f"extract={kind}", "extract.top_p=0.5", "overwrite=true")
    path = fresh.experiment / "world/models/a"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    chats, _ = load_chats(str(fresh.experiment / "world/chats/fusion.jsonl"))
    store = DistributionStore(fresh.experiment / "distributions/a")
    for row in (0, 40):
        rendered = ChatRenderer(tokenizer)([chats[row]["messages"]])[0]
        with torch.no_grad():
            logits = model(torch.from_numpy(rendered.input_ids)[None]).logits[0][rendered.positions]
        gold = torch.from_numpy(rendered.input_ids[rendered.positions + 1])
        generator = generator_for(rendered.text, 0, torch.device("cpu"))
        wanted = KINDS[kind].function(logits, gold, Keep(len(tokenizer), top_p=0.5), generator)
        present = ~wanted.logprobs.isneginf()
        ids, counts, logprobs = store.row(row, "ids", "counts", "logprobs")
        assert counts.tolist() == present.sum(-1).tolist()
        assert (
            np.mean(ids == wanted.ids[present].numpy()) > 0.99
        )  # two tokens as likely as each other may change places
        assert np.allclose(decode_logprobs(logprobs), wanted.logprobs[present], atol=0.02)


@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.integers(1, 12))
def test_top_p_is_the_shortest_beginning_that_holds_p(seed: int, p: float, k: int) -> None:
    logits = 2 * torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    top = KINDS["top_p"].function(logits, torch.zeros(6, dtype=torch.long), Keep(12, top_k=k, top_p=p), None)
    for row, probs in enumerate(logits.softmax(-1).sort(descending=True).values.tolist()):
        kept = int((~top.logprobs[row].isneginf()).sum())
        assert 1 <= kept <= k
        assert kept == 1 or sum(probs[: kept - 1]) < p + 1e-5
        assert kept == k or sum(probs[:kept]) > p - 1e-5


def test_texts_of_one_length_draw_independently() -> None:
    logits, gold, keep = torch.zeros(400, 50), torch.zeros(400, dtype=torch.long), Keep(50, draws=1)
    drawn = {
        text: KINDS["sampled"].function(logits, gold, keep, generator_for(text, seed, torch.device("cpu"))).ids[:, 0]
        for text, seed in [("abc", 0), ("abd", 0), ("abc ", 1)]
    }
    again = KINDS["sampled"].function(logits, gold, keep, generator_for("abc", 0, torch.device("cpu"))).ids[:, 0]
    assert torch.equal(drawn["abc"], again)
    for one, other in [("abc", "abd"), ("abc", "abc "), ("abd", "abc ")]:
        assert (drawn[one] == drawn[other]).sum() < 30, "1 in 50 agrees by chance: 8 of 400 expected"


def test_only_kinds_that_draw_note_how_they_are_seeded(mini: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusechat.app import outputs

    seen: dict[str, dict[str, Any]] = {}

    def stop(imports: Any = None, **parts: Any) -> str:
        seen[parts["extract"]["kind"]] = parts
        raise InterruptedError

    monkeypatch.setattr(outputs, "stage_fingerprint", stop)
    for kind in KINDS:
        with pytest.raises(InterruptedError):
            mini.run("extract", "source=a", f"extract={kind}")
    assert {kind: parts.get("draws") for kind, parts in seen.items()} == {
        "top_k": None,
        "top_p": None,
        "sampled": "by content",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_nan_never_raises_and_is_always_told(kind: str) -> None:
    logits = torch.zeros(2, 8)
    logits[1, 3] = float("nan")
    top = KINDS[kind].function(logits, torch.tensor([1, 1]), Keep(8, top_k=4), torch.Generator().manual_seed(0))
    assert torch.isfinite(top.gold_logprob).tolist() == [True, False]


def test_the_groups_files_are_the_kinds() -> None:
    assert choices("extract.kind") == {name: member.help for name, member in KINDS.items()}


@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([1000, 1024, 1100, 30]))
def test_largest_is_topk(seed: int, k: int, width: int) -> None:
    values = torch.randn(5, width, generator=torch.Generator().manual_seed(seed))
    wanted, ours = values.topk(k), largest(values, k)
    assert torch.equal(wanted.values, ours[0])
    assert torch.equal(values.gather(1, ours[1]), wanted.values)


def test_sampling_is_unbiased() -> None:
    logits, generator = torch.randn(1, 6).repeat(4000, 1), torch.Generator().manual_seed(0)
    top = KINDS["sampled"].function(logits, torch.zeros(4000, dtype=torch.long), Keep(6, draws=20), generator)
    mean = torch.zeros(4000, 6).scatter_add(1, top.ids, top.logprobs.exp()).mean(0)
    assert torch.allclose(mean, logits[0].softmax(-1), atol=0.01)


def test_top_p_keeps_the_fewest() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    top = KINDS["top_p"].function(probs.log(), torch.tensor([3]), Keep(4, top_k=4, top_p=0.75), None)
    assert top.ids[0, : int((~top.logprobs.isneginf()).sum())].tolist() == [0, 1]
    assert top.gold_logprob.exp().item() == pytest.approx(0.05)
