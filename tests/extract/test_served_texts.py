"""Servers that give texts of tokens, not ids."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from fusechat.app.errors import UserError
from fusechat.chats.formats import load_chats
from fusechat.chats.render import ChatRenderer
from fusechat.extract.summary import totals
from fusechat.stores.encoding import decode_logprobs
from fusechat.stores.served.by_text import texts_of
from fusechat.stores.store import DistributionStore
from tests.conftest import Mini, run_entry
from tests.extract.served import SMALL, Serve, changed, run, with_rows
from tests.stores.served.servers import VLLM, Answer, LlamaCpp, Logits


def peaked(tokenizer: Any) -> Logits:
    """Logits that most often know the next token, and give nothing to tokens whose text is not theirs alone."""
    texts = texts_of(tokenizer)
    alone = torch.tensor([sum(bool(own & other) for other in texts) == 1 for own in texts])

    def logits(ids: list[int]) -> Tensor:
        generator = torch.Generator().manual_seed(sum(ids))
        found = 2 * torch.randn(len(ids), len(texts), generator=generator)
        found[:, ~alone] -= 30
        rows = torch.arange(len(ids) - 1)[torch.rand(len(ids) - 1, generator=generator) < 0.8]
        found[rows, torch.tensor(ids)[rows + 1]] += torch.where(alone[torch.tensor(ids)[rows + 1]], 12.0, 40.0)
        return found

    return logits


def test_nothing_below_the_likeliest_is_taken_for_minus_infinity(mini: Mini, serving: Serve, tmp_path: Path) -> None:
    """-9999 is how JSON has it: such entries are absent, as those of the embedding's padding are."""
    server = serving(VLLM, "a")

    def last(row: dict[str, Any]) -> dict[str, Any]:
        tenth = next(token for token in row if row[token]["rank"] == 10)
        return row | {tenth: row[tenth] | {"logprob": -9999.0}}

    server.spoil = with_rows(last)
    store = run(mini, server, tmp_path / "a", "extract.max_bad_fraction=1.0")
    bad = totals(store.manifest)["bad"]
    sound = [n for n, name in enumerate(store.column("id").tolist()) if name not in bad]
    assert sound and all((store.row(n, "counts")[0] == 9).all() for n in sound)


def test_texts_that_belong_to_one_id_are_taken(mini: Mini, serving: Serve, tmp_path: Path) -> None:
    """With BOS at the beginning every token's own log-probability is known, also of ends of turns, which have no text."""
    path = mini.experiment / "world/models/pivot"
    tokenizer = AutoTokenizer.from_pretrained(path)
    logits = peaked(tokenizer)
    store = run(mini, serving(LlamaCpp, "pivot", logits), tmp_path / "pivot", name="pivot")
    sums = totals(store.manifest)
    assert sums["positions"] > 40 and sums["bounded"] == 0 and sums["lost"] < 1e-6 * sums["positions"]
    agree(store, logits, path, mini)


def test_rows_that_come_early_are_put_right(mini: Mini, serving: Serve, tmp_path: Path) -> None:
    """Without BOS each row is the next token's, whose log-probability is known where its text is among the listed."""
    path = mini.experiment / "world/models/b"
    tokenizer = AutoTokenizer.from_pretrained(path)
    logits, server = peaked(tokenizer), serving(LlamaCpp, "b", peaked(tokenizer))
    options = ["chat.template=native", "chat.end_of_turn=false"]
    store = run(mini, server, tmp_path / "b", *options, name="b")
    assert totals(store.manifest)["bounded"] == 0
    assert {body["logprobs"] for body in server.asked if "logprobs" in body} <= {10, len(tokenizer)}
    agree(store, logits, path, mini, end_of_turn=False)
    with pytest.raises(
        UserError, match=r"[\d.]+% of the mass .*\d% of the next tokens are not listed.*chat\.end_of_turn="
    ):
        run(mini, server, tmp_path / "ends", "chat.template=native", name="b")


def agree(store: DistributionStore, logits: Logits, path: Path, mini: Mini, end_of_turn: bool = True) -> None:
    """A store against the logits that a server had, chat by chat."""
    chats, _ = load_chats(str(mini.experiment / "world/chats/fusion.jsonl"))
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(path), end_of_turn=end_of_turn)
    for row in range(12):
        rendered = renderer([chats[row]["messages"]])[0]
        logprobs = logits(rendered.input_ids.tolist()).log_softmax(-1)[rendered.positions]
        counts, ids, stored, gold = store.row(row, "counts", "ids", "logprobs", "gold_logprob")
        wanted = torch.gather(logprobs, 1, torch.from_numpy(rendered.input_ids[rendered.positions + 1])[:, None])[:, 0]
        assert np.allclose(gold.astype(np.float32), wanted, atol=0.02)
        assert (counts == 10).all()
        assert np.allclose(decode_logprobs(stored).reshape(-1, 10), logprobs.topk(10).values, atol=0.02)
        assert np.array_equal(ids.reshape(-1, 10), logprobs.topk(10).indices)


def test_mass_without_an_id_is_counted_and_too_much_refused(mini: Mini, serving: Serve, tmp_path: Path) -> None:
    """What is lost is never more than told: with few entries several bytes hide under one text."""
    path = mini.experiment / "world/models/pivot"
    tokenizer = AutoTokenizer.from_pretrained(path)
    sharp, texts = peaked(tokenizer), texts_of(tokenizer)
    alone = torch.tensor([sum(bool(own & other) for other in texts) == 1 for own in texts])

    def logits(ids: list[int]) -> Tensor:
        found = sharp(ids)
        found[:, ~alone] += 29 + 4.2 * torch.rand(int((~alone).sum()), generator=torch.Generator().manual_seed(1))
        return found

    server = serving(LlamaCpp, "pivot", logits)
    with pytest.raises(
        UserError, match=r"[\d.]+% of the mass .* belongs to no single token id, .* at most 1% may: serve"
    ):
        run(mini, server, tmp_path / "refused", name="pivot")
    from fusechat.extract import served

    monkey = pytest.MonkeyPatch()
    monkey.setattr(served, "MOST", 1.0)
    store = run(mini, server, tmp_path / "pivot", name="pivot")
    monkey.undo()
    chats, _ = load_chats(str(mini.experiment / "world/chats/fusion.jsonl"))
    missing = 0.0
    for row in range(12):
        rendered = ChatRenderer(tokenizer)([chats[row]["messages"]])[0]
        probs = logits(rendered.input_ids.tolist()).softmax(-1)[rendered.positions]
        (stored,) = store.row(row, "logprobs")
        kept = np.exp(decode_logprobs(stored)).sum()
        missing += float(probs.topk(10).values.sum()) - float(kept)
    assert 0 < missing <= totals(store.manifest)["lost"] * 1.02


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            changed(logprobs=None),
            r"lists no log-probabilities of the prompt .* --logits_all true, llama\.cpp's own server",
        ),
        (
            lambda a: a | {"usage": {"prompt_tokens": 7}},
            r"reads a chat as 7 tokens, .* at place 0, where the tokenizer of",
        ),
    ],
)
def test_texts_that_do_not_fit(
    spoil: Callable[[Answer], Any], message: str, mini: Mini, serving: Serve, tmp_path: Path
) -> None:
    server = serving(LlamaCpp, "pivot", peaked(AutoTokenizer.from_pretrained(mini.experiment / "world/models/pivot")))
    server.spoil = lambda answer: spoil(answer) if answer["choices"][0]["logprobs"] else answer
    with pytest.raises(UserError, match=message):
        run(mini, server, tmp_path / "pivot", name="pivot")


def test_another_tokenizer_and_rows_beside_other_tokens_are_refused(mini: Mini, serving: Serve, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(mini.experiment / "world/models/pivot")
    other = serving(LlamaCpp, "c", peaked(AutoTokenizer.from_pretrained(mini.experiment / "world/models/c")))
    with pytest.raises(
        UserError, match=r"reads a chat as \d+ tokens, .* where the tokenizer of source\.path has \d+, "
    ):
        run(mini, other, tmp_path / "other", name="pivot")
    server = serving(LlamaCpp, "pivot", peaked(tokenizer))

    def late(answer: Answer) -> Answer:
        """As if rows came early where they are taken to be in their places."""
        listed = answer["choices"][0]["logprobs"]
        if listed:
            listed["top_logprobs"] = [None, *listed["top_logprobs"][2:], listed["top_logprobs"][1]]
        return answer

    server.spoil = late
    with pytest.raises(UserError, match=r"lists distributions beside other tokens than those that they predict"):
        run(mini, server, tmp_path / "late", name="pivot")


def test_a_server_that_adds_bos_is_sent_none(mini: Mini, serving: Serve, tmp_path: Path) -> None:
    path = mini.experiment / "world/models/pivot"
    logits = peaked(AutoTokenizer.from_pretrained(path))
    server = serving(LlamaCpp, "pivot", logits)
    server.adds_bos = True
    agree(run(mini, server, tmp_path / "pivot", name="pivot"), logits, path, mini)


def test_a_source_known_by_its_name_at_the_server_alone(mini: Mini, serving: Serve, tmp_path: Path) -> None:
    """Where it is an id (here a folder), the tokenizer lies there too; and no pivot is named where none is read."""
    server = serving(VLLM, "a")
    server.models = None
    given = [f"source.model={mini.experiment}/world/models/a", f"chat.path={mini.experiment}/world/chats/fusion.jsonl"]
    given += ["source.name=a", "source.engine=server", f"source.base_url={server.url}", "chat.template=native"]
    run_entry("extract", [*given, *SMALL, "chat.max_length=256", f"output_dir={tmp_path}/a"])
    assert len(DistributionStore(tmp_path / "a")) == len(server.asked) == 12
