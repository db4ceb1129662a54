"""Answers, settings and refusals of a server that do not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusechat.app.errors import UserError
from tests.conftest import Mini
from tests.extract.served import Serve, changed, every, run, with_rows
from tests.stores.served.servers import VLLM, Answer


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
