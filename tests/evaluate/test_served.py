"""Models behind servers are measured as those that run here; what a server cannot give is refused by name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fusechat.app.errors import UserError
from fusechat.evaluate import evaluate
from fusechat.report.results import read_result
from fusechat.stores.served.server import Server as Place
from tests.conftest import Mini
from tests.stores.served.servers import VLLM, LlamaCpp, Server, of_model


@pytest.fixture
def vllm(mini: Mini) -> Iterator[Server]:
    path = mini.experiment / "world/models/pivot"
    made = VLLM(AutoTokenizer.from_pretrained(path), of_model(path))
    yield made
    made.server.shutdown()


def command(mini: Mini, server: Server, engine: str, file: Path, *overrides: str) -> list[str]:
    asked = [f"evaluation.engine={engine}", f"evaluation.base_url={server.url}", "evaluation.model=big"]
    model = f"model={mini.experiment}/world/models/pivot"
    return [model, *asked, "evaluation.wait=0.01", f"output_file={file}", *overrides]


def test_chats_are_measured_as_by_the_model_here(mini: Mini, vllm: Server, tmp_path: Path) -> None:
    few = ["evaluation.limit=8", "evaluation.max_new_tokens=4"]
    mini.run("evaluate", f"model={mini.experiment}/world/models/pivot", f"output_file={tmp_path}/here.json", *few)
    mini.run("evaluate", *command(mini, vllm, "server", tmp_path / "there.json", *few))
    here, there = read_result(tmp_path / "here.json"), read_result(tmp_path / "there.json")
    assert len(here["samples"]) == 8
    for one, other in zip(here["samples"], there["samples"], strict=True):
        for key in ("id", "tag", "bytes", "tokens", "prompt", "reference", "answer", "correct", "hits"):
            assert one[key] == other[key], key
        assert one["nats"] == pytest.approx(other["nats"], rel=1e-4)
    assert (there["engine"], there["served"]) == ("server", "big")
    assert "engine" not in here and here["fingerprint"] != there["fingerprint"]
    asked = len(vllm.asked)
    mini.run("evaluate", *command(mini, vllm, "server", tmp_path / "there.json", *few, "evaluation.requests=2"))
    assert len(vllm.asked) == asked == 16, "measured already, however it is asked"


def test_answers_of_either_server(mini: Mini, vllm: Server, tmp_path: Path) -> None:
    questions = tmp_path / "alpaca.json"
    questions.write_text(json.dumps([{"instruction": "Sort b a."}, {"instruction": "Reverse x y."}]))
    own = ["evaluation=alpaca_eval", f"evaluation.questions={questions}", "evaluation.max_new_tokens=4"]
    path = mini.experiment / "world/models/pivot"
    texts = LlamaCpp(vllm.tokenizer, vllm.logits)
    mini.run("evaluate", f"model={path}", f"output_file={tmp_path}/here.json", *own)
    mini.run("evaluate", *command(mini, vllm, "server", tmp_path / "ids.json", *own))
    mini.run("evaluate", *command(mini, texts, "text_server", tmp_path / "texts.json", *own))
    texts.server.shutdown()
    answers = [
        [row["output"] for row in json.loads((tmp_path / f"{name}.json").read_text())]
        for name in ("here", "ids", "texts")
    ]
    assert answers[0] == answers[1] == answers[2]
    assert {body["temperature"] for body in vllm.asked} == {0.0}
    assert all(body["stop_token_ids"] for body in vllm.asked)


@pytest.mark.parametrize(
    ("engine", "overrides", "message"),
    [
        (
            "text_server",
            [],
            r"evaluation\.engine=text_server gives answers alone .*bits per byte .* take evaluation\.engine=",
        ),
        ("server", ["evaluation.base_url=null"], r"evaluation\.base_url is missing; run: .* evaluation\.base_url=http"),
        ("server", ["evaluation.model=small"], r"serves no model 'small'; set evaluation\.model to one of: big"),
    ],
)
def test_what_a_server_does_not_give(
    engine: str, overrides: list[str], message: str, mini: Mini, vllm: Server, tmp_path: Path
) -> None:
    server: Any = vllm if engine == "server" else LlamaCpp(vllm.tokenizer, vllm.logits)
    with pytest.raises(UserError, match=message):
        mini.run("evaluate", *command(mini, server, engine, tmp_path / "x.json", *overrides))
    if server is not vllm:
        server.server.shutdown()


@pytest.mark.parametrize("kind", ["lm_eval", "own_kind"])
def test_kinds_that_want_the_model_are_refused_by_name(kind: str, mini: Mini, tmp_path: Path) -> None:
    from fusechat.evaluate.kinds import EVALUATIONS, Job, Work
    from fusechat.evaluate.stage import evaluate_by

    if kind not in [*EVALUATIONS]:

        @EVALUATIONS.register(kind, "its own")
        def own(job: Job) -> Work:
            return Work(lambda part: {"samples": [len(job.load())]})

    place = Place("http://localhost:1/v1", "big", section="evaluation")
    settings = {"kind": kind, "tasks": ["x"], "include_path": None}
    try:
        with pytest.raises(
            UserError, match=rf"evaluation\.kind={kind} wants the model itself, and evaluation\.engine=server"
        ):
            evaluate_by(mini.experiment / "world/models/pivot", settings, tmp_path / "x.json", server=place)
    finally:
        EVALUATIONS._members.pop("own_kind", None)


def test_from_python(mini: Mini, vllm: Server, tmp_path: Path) -> None:
    place = Place(vllm.url, "big", section="evaluation")
    chats = mini.experiment / "world/chats/test.jsonl"
    result = evaluate(
        mini.experiment / "world/models/pivot",
        chats,
        tmp_path / "x.json",
        limit=2,
        generate=False,
        max_length=256,
        server=place,
    )
    assert len(result["samples"]) == len(vllm.asked) == 2
    assert "secret" not in repr(Place(vllm.url, "big", key="secret"))
