"""Sources behind servers: the same stores as from models here, what is asked again, what decides an output."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest

from fusechat.app.errors import UserError
from fusechat.extract.summary import totals
from fusechat.stores.encoding import decode_logprobs
from fusechat.stores.store import DistributionStore
from tests.conftest import Mini
from tests.extract.served import SMALL, Serve, run
from tests.stores.served.servers import VLLM


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
