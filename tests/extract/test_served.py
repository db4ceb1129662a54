"""Sources behind servers: the same stores as from models here, what is refused, what is asked again."""

import logging
import re
from collections.abc import Callable, Iterator
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
from tests.stores.served.servers import VLLM, Answer, LlamaCpp, Logits, Server, of_model

SMALL = ["chat.limit=12", "extract.rows_per_shard=4", "source.wait=0.01"]
Serve = Callable[..., Any]


@pytest.fixture
def serving(mini: Mini) -> Iterator[Serve]:
    """Makes servers of the miniature world's models, or of other logits."""
    made: list[Server] = []

    def serve(kind: type[Server], name: str, logits: Logits | None = None) -> Server:
        path = mini.experiment / "world/models" / name
        made.append(kind(AutoTokenizer.from_pretrained(path), logits or of_model(path)))
        return made[-1]

    yield serve
    for server in made:
        server.server.shutdown()


def run(mini: Mini, server: Server, output: Path, *overrides: str, name: str = "a") -> DistributionStore:
    engine = "text_server" if isinstance(server, LlamaCpp) else "server"
    asked = [f"source.engine={engine}", f"source.base_url={server.url}", "source.model=big", f"output_dir={output}"]
    mini.run("extract", f"source={name}", *SMALL, *asked, *overrides)
    return DistributionStore(output)


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


@pytest.mark.parametrize("kind", ["top_k", "top_p"])
def test_the_same_store_as_from_the_model_here(kind: str, mini: Mini, serving: Serve, tmp_path: Path) -> None:
    kept = [f"extract={kind}", "extract.top_p=0.3"]
    mini.run("extract", "source=a", *SMALL, *kept, f"output_dir={tmp_path}/here")
    here, there = DistributionStore(tmp_path / "here"), run(mini, serving(VLLM, "a"), tmp_path / "there", *kept)
    there.verify()
    assert here.columns == there.columns
    assert totals(there.manifest)["padding"] == 0
    names = ("input_ids", "positions", "boundaries", "counts", "ids", "logprobs", "gold_logprob")
    for row in range(12):
        pairs = dict(zip(names, zip(here.row(row, *names), there.row(row, *names), strict=True), strict=True))
        assert all(one.dtype == other.dtype for one, other in pairs.values())
        for name in names[:4]:
            assert np.array_equal(*pairs[name]), name
        assert np.mean(np.equal(*pairs["ids"])) > 0.98, "two tokens as likely as each other may change places"
        for name in names[5:]:
            assert np.allclose(*map(decode_logprobs, pairs[name]), atol=0.02), name
    for name in ("nats", "bytes", "tokens", "end"):
        assert np.allclose(here.column(name), there.column(name), rtol=1e-3), name
    assert (there.manifest["engine"], there.manifest["served"]) == ("server", "big")
    assert there.manifest.keys() == here.manifest.keys() | {"engine", "served"}


def test_what_failed_is_gone_on_with(mini: Mini, serving: Serve, tmp_path: Path) -> None:
    server = serving(VLLM, "a")
    whole = run(mini, server, tmp_path / "whole").manifest["shards"]
    server.asked.clear()
    server.status = lambda n: 200 if n <= 6 else 503
    failed = (
        r"the server at http.* failed 2 times; the shards so far are whole: run the same command again \(status 503\)"
    )
    with pytest.raises(UserError, match=failed):
        run(mini, server, tmp_path / "a", "source.retries=1", "source.requests=1")
    server.status, asked = (lambda n: 200), len(server.asked)
    again = run(mini, server, tmp_path / "a").manifest["shards"]
    assert len(server.asked) - asked == 8, "one shard of four chats was whole"
    assert [shard["xxh3_128"] for shard in again] == [shard["xxh3_128"] for shard in whole]


def test_busy_servers_are_asked_again_and_keys_stay_where_they_are(
    mini: Mini, serving: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", "secret-key")
    server = serving(VLLM, "a")
    server.status = lambda n: {1: 429, 2: 500, 5: 504}.get(n, 200)
    with caplog.at_level(logging.DEBUG):
        run(mini, server, tmp_path / "a", "source.key_env=MY_KEY", "logger=csv")
    assert (server.keys, len(server.asked)) == ({"Bearer secret-key"}, 15)
    assert re.search(r"does not answer \(status (429|500|504)\)", caplog.text), (
        "of several at once, any may be the first"
    )
    assert "big behind a server: 0.00% of the mass without a token id, 0 next tokens not listed" in caplog.text
    held = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert "secret-key" not in caplog.text and b"secret-key" not in held and server.url.encode() not in held


def test_where_a_server_is_decides_nothing_and_what_it_serves_does(mini: Mini, serving: Serve, tmp_path: Path) -> None:
    run(mini, serving(VLLM, "a"), tmp_path / "a")
    moved = serving(VLLM, "a")
    run(mini, moved, tmp_path / "a", "source.requests=3", "source.dtype=bfloat16", "extract.tokens_per_batch=64")
    assert not moved.asked
    other = serving(VLLM, "a")
    other.models = None  # a server need not say what it has
    with pytest.raises(UserError, match=r'holds a store made with other settings .*served: "big" there, "bigger" now'):
        run(mini, other, tmp_path / "a", "source.model=bigger")


def changed(**values: Any) -> Callable[[Answer], Answer]:
    return lambda answer: answer | {"choices": [answer["choices"][0] | values]}


def with_rows(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Answer], Answer]:
    """Changes what is listed at every place."""

    def spoil(answer: Answer) -> Answer:
        rows = answer["choices"][0]["prompt_logprobs"]
        return changed(prompt_logprobs=[None, *map(change, rows[1:])])(answer)

    return spoil


def every(entry: dict[str, Any]) -> Callable[[Answer], Answer]:
    return with_rows(lambda row: {token: old | entry for token, old in row.items()})


def fewer(row: dict[str, Any]) -> dict[str, Any]:
    return {token: row[token] for token in sorted(row, key=lambda t: row[t]["rank"])[-8:]}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda a: b"<html><body>Welcome</body></html>",
            r"no completion \(no JSON\): '<html>.*base_url the address of",
        ),
        (lambda a: {"choices": []}, r"answers with no completion \(choices: .*\): .* up to and with /v1\?"),
        (lambda a: {"object": "text_completion"}, r"answers without choices; see source\.base_url"),
        (
            changed(prompt_logprobs=None),
            r"answers without prompt_logprobs, .*source\.engine=text_server asks for texts",
        ),
        (
            changed(prompt_token_ids=None),
            r"does not say which tokens it read \(prompt_token_ids\); vLLM does from 0\.10\.2",
        ),
        (changed(prompt_token_ids=[1, 2, 3]), r"has read 3 tokens where \d+ were sent, others from place 0 on"),
        (
            lambda a: changed(prompt_logprobs=a["choices"][0]["prompt_logprobs"][1:])(a),
            r"of \d+ tokens where \d+ were sent",
        ),
        (with_rows(fewer), r"lists (8 tokens at place \d+, expected 10 or 11|nothing for token).*serve"),
        (
            with_rows(lambda row: {"1": row[next(iter(row))]}),
            r"lists nothing for token \d+, which was sent at place \d+",
        ),
        (
            with_rows(lambda row: row | {"10000": row[next(iter(row))]}),
            r"lists 1[12] tokens|names token 10000, the model of",
        ),
        (every({"logprob": 3.0}), r"lists a log-probability 3\.00; serve it with --logprobs-mode raw_logprobs"),
        (
            every({"logprob": -1.0}),
            r"lists probabilities that sum to 3\.\d+; serve it with --logprobs-mode raw_logprobs",
        ),
        (every({"decoded_token": "zz"}), r"writes token \d+ as 'zz', the tokenizer of source\.path as "),
        (
            every({"logprob": "high"}),
            r"no completion \(choices\.0\.prompt_logprobs\.1\..*logprob: Input should be a valid num",
        ),
        (every({"logprob": float("nan")}), r"chats gave NaN or inf .*extract\.max_bad_fraction=0\.01; .*--dtype"),
        (every({"logprob": -9999.0}), r"chats gave NaN or inf .*extract\.max_bad_fraction=0\.01"),
    ],
)
def test_answers_that_do_not_fit(
    spoil: Callable[[Answer], Any], message: str, mini: Mini, serving: Serve, tmp_path: Path
) -> None:
    server = serving(VLLM, "a")
    server.spoil = spoil
    with pytest.raises(UserError, match=message) as raised:
        run(mini, server, tmp_path / "a")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("a/*.arrow")), "nothing of it is kept"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["extract=sampled"], r"extract\.kind='sampled' is unknown; use one of: top_k, top_p"),
        (["source.model=other"], r"serves no model 'other'; set source\.model to one of: big"),
        (
            ["chat.max_length=513"],
            r"reads at most 513 tokens, one of them its own; .* set chat\.max_length=512, or serve it",
        ),
        (["source.base_url=null"], r"source\.base_url is missing; run: .*source\.base_url=http://HOST:8000/v1"),
        (["source.base_url=localhost:8000"], r"source\.base_url='localhost:8000': expected an address"),
        (["source.engine=vllm"], r"source\.engine='vllm' is unknown; use one of: transformers, server, text_server"),
        (["source.requests=0"], r"source\.requests=0: expected a whole number from 1 on"),
        (["source.path=/nowhere"], r"source\.path=/nowhere does not exist"),
    ],
)
def test_settings_that_do_not_fit(
    overrides: list[str], message: str, mini: Mini, serving: Serve, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(mini, serving(VLLM, "a"), tmp_path / "a", *overrides)


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "key_env"), (403, "key_env"), (404, "base_url and"), (400, "top_k")]
)
def test_refusals_end_at_once(status: int, remedy: str, mini: Mini, serving: Serve, tmp_path: Path) -> None:
    server = serving(VLLM, "a")
    server.status = lambda n: status
    with pytest.raises(UserError, match=rf"the server at http.* refuses \({status}\): .*no.*{remedy}"):
        run(mini, server, tmp_path / "a", "source.requests=1")
    assert len(server.asked) == 1


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
