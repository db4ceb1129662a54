"""Judging against a local HTTP server that plays the API: grades, pairs, garbage, 429 and 500, refusals, resumption."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusechat.app.errors import UserError
from fusechat.judge import judge as judge_answers
from fusechat.judge.endpoint import Judge, Task
from fusechat.report.results import read_result
from tests.conftest import run_entry
from tests.serving import serve, url

Answer = Callable[[str, int], tuple[int, str]]


class Server:
    """An OpenAI-compatible endpoint; ``answer(prompt, call)`` gives status and text."""

    def __init__(self) -> None:
        self.answer: Answer = lambda prompt, call: (200, "Fine. [[7]]")
        self.prompts: list[str] = []
        self.keys: set[str] = set()
        self.server = serve(self.take)
        self.url = f"{url(self.server)}/v1"

    def take(self, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        assert path == "/v1/chat/completions"
        self.prompts.append(json.loads(body)["messages"][0]["content"])
        self.keys.add(headers["Authorization"])
        status, text = self.answer(self.prompts[-1], len(self.prompts))
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return status, {"id": "x", "object": "chat.completion", "choices": [choice]} if status == 200 else {
            "error": text
        }


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.server.shutdown()


def files(folder: Path) -> tuple[Path, Path, Path]:
    """Questions, and two models' answers of two turns."""
    questions = [
        {
            "question_id": n,
            "category": "math" if n % 2 else "writing",
            "turns": [f"q{n}", "more?"],
            "reference": ["4", "5"],
        }
        for n in range(4)
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    for model in ("good", "poor"):
        rows = [
            {
                "question_id": n,
                "model_id": model,
                "choices": [{"index": 0, "turns": [f"{model} {n} first", f"{model} {n} second"]}],
            }
            for n in range(4)
        ]
        (folder / f"{model}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "q.jsonl", folder / "good.jsonl", folder / "poor.jsonl"


def judge(folder: Path, server: Server, *overrides: str) -> float:
    questions, good, _ = files(folder)
    options = [
        f"answers={good}",
        f"questions={questions}",
        "experiment=tiny",
        f"judge.base_url={server.url}",
        "judge.model=gpt",
        "judge.wait=0.01",
        f"paths.root={folder}",
    ]
    return float(run_entry("judge", [*options, *overrides]))


def result(folder: Path) -> dict[str, Any]:
    return read_result(folder / "tiny/seed0/evaluation/judge/good.json")


def test_grades_with_a_spread(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    server.answer = lambda prompt, call: (200, f"Well. [[1]] would be unfair: my grade is [[{6 + (call - 1) % 3}]]")
    value = judge(tmp_path, server, "judge.repeats=3", "judge.parallel=1")
    content = result(tmp_path)
    assert content["metrics"]["grade"]["all"]["value"] == value
    assert set(content["metrics"]["grade"]) == {"all", "math", "writing"}
    assert len(content["samples"]) == 8
    assert len(content["judgements"]) == len(server.prompts) == 24
    assert (value, content["spread"]) == (7, 1), "each answer was given 6, 7 and 8"
    assert server.keys == {"Bearer secret-key"}
    assert "secret-key" not in (tmp_path / "tiny/seed0/evaluation/judge/good.json").read_text()
    second = next(p for p in server.prompts if "good 1 second" in p)
    assert all(part in second for part in ("q1", "good 1 first", "more?", "A reference answer: 5"))


def test_pairs_are_judged_in_both_orders(tmp_path: Path, server: Server) -> None:
    def better(prompt: str, call: int) -> tuple[int, str]:
        if "q0" in prompt:
            return 200, "[[A]]"  # always the first: a tie once both orders are asked
        return 200, "[[A]]" if prompt.index("good") < prompt.index("poor") else "[[B]]"

    server.answer = better
    value = judge(tmp_path, server, f"baseline={tmp_path}/poor.jsonl")
    samples = {s["id"]: s["win_rate"] for s in result(tmp_path)["samples"]}
    assert samples == {f"{n}/{turn}": 0.5 if n == 0 else 1.0 for n in range(4) for turn in (1, 2)}
    assert value == pytest.approx(7 / 8)


def test_busy_and_broken_servers_are_asked_again(tmp_path: Path, server: Server) -> None:
    server.answer = lambda prompt, call: (
        (429, "slow down") if call == 1 else (500, "oops") if call == 3 else (200, "[[5]]")
    )
    assert judge(tmp_path, server, "judge.parallel=1") == 5
    assert len(server.prompts) == 10


def test_what_was_judged_is_kept_when_the_server_goes_down(tmp_path: Path, server: Server) -> None:
    server.answer = lambda prompt, call: (200, "[[5]]") if call <= 5 else (503, "down")
    with pytest.raises(
        UserError,
        match=r"the judge at http.* failed 3 times; judgements so far are kept: run the same command again \(status 503\)",
    ):
        judge(tmp_path, server, "judge.parallel=1", "judge.retries=2")
    server.prompts.clear()
    server.answer = lambda prompt, call: (200, "[[9]]")
    assert judge(tmp_path, server, "judge.parallel=1", "judge.retries=2") == pytest.approx((5 * 5 + 3 * 9) / 8)
    assert len(server.prompts) == 3


def test_garbage_is_asked_again_counted_and_too_much_of_it_refused(tmp_path: Path, server: Server) -> None:
    server.answer = lambda prompt, call: (200, "no grade here" if "good 2 second" in prompt else "[[4]]")
    assert judge(tmp_path, server, "judge.max_bad_fraction=0.2") == 4
    assert result(tmp_path)["without_grade"] == ["2/2/0"]
    assert sum("good 2 second" in prompt for prompt in server.prompts) == 3
    server.answer = lambda prompt, call: (200, "[[11]] [[ten]]")
    with pytest.raises(
        UserError,
        match=r"judgements hold no grade, more than judge\.max_bad_fraction=0\.05; the last began '\[\[11\]\]",
    ):
        judge(tmp_path, server, "judge.repeats=2", "judge.suffix=_again")


def test_a_refusal_ends_at_once(tmp_path: Path, server: Server) -> None:
    server.answer = lambda prompt, call: (401, "bad key")
    with pytest.raises(UserError, match=r"the judge at http.* refuses \(401\).*see judge\.key_env"):
        judge(tmp_path, server, "judge.parallel=1")
    assert len(server.prompts) == 1


def test_nobody_there(tmp_path: Path) -> None:
    options = {"temperature": 0.0, "max_tokens": 8, "retries": 1, "wait": 0.0, "tries": 1}
    failed = r"the judge at http://127\.0\.0\.1:9/v1 failed 2 times; .* \(ConnectError\)"
    with Judge("http://127.0.0.1:9/v1", "m", None, **options) as ask, pytest.raises(UserError, match=failed):
        ask(Task("1/1/0", "1/1", "", [("q", "a")]))
    assert ask.endpoint.client.is_closed
    with pytest.raises(UserError, match=r"judge\.base_url='localhost:9/v1': expected an address, http"):
        Judge("localhost:9/v1", "m", None, **options)


def test_waits_double_with_jitter_(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("fusechat.app.endpoint.time.sleep", pauses.append)
    server.answer = lambda prompt, call: (429, "slow down") if call < 5 else (200, "[[5]]")
    options = {"temperature": 0.0, "max_tokens": 8, "retries": 4, "wait": 1.0, "tries": 1}
    with Judge(server.url, "m", None, **options) as ask:
        assert ask(Task("1/1/0", "1/1", "", [("q", "a")]))["value"] == 5
    assert all(2**n <= pause <= 2**n + 1 for n, pause in enumerate(pauses))
    assert len(pauses) == 4


def test_from_python(tmp_path: Path, server: Server) -> None:
    questions, good, _ = files(tmp_path)
    result = judge_answers(good, tmp_path / "grades.json", base_url=server.url, model="m", questions=questions)
    assert result["metrics"]["grade"]["all"]["value"] == 7
    assert read_result(tmp_path / "grades.json")["samples"] == result["samples"]


def test_answers_to_other_questions_are_refused(tmp_path: Path, server: Server) -> None:
    _, _, poor = files(tmp_path)
    poor.write_text(poor.read_text().splitlines()[0] + "\n")
    kept = poor.read_text()
    questions, good, _ = tmp_path / "q.jsonl", tmp_path / "good.jsonl", poor
    options = [
        f"answers={good}",
        f"questions={questions}",
        f"judge.base_url={server.url}",
        "judge.model=m",
        f"paths.root={tmp_path}",
    ]
    with pytest.raises(UserError, match=r"answer different questions; write both with the same evaluation\.questions"):
        run_entry("judge", [*options, f"baseline={poor}"])
    assert poor.read_text() == kept
    with pytest.raises(UserError, match=r"answers question 0, which questions=None lacks"):
        run_entry("judge", [options[0], *options[2:]])


def test_judgements_are_kept_and_not_written_over(tmp_path: Path, server: Server) -> None:
    assert judge(tmp_path, server) == 7
    asked = len(server.prompts)
    assert judge(tmp_path, server) == 7
    assert len(server.prompts) == asked, "judged already"
    with pytest.raises(
        UserError,
        match=r"good\.json holds a judgement made with other settings .* overwrite=true to replace it, or judge\.suffix=_N",
    ):
        judge(tmp_path, server, f"baseline={tmp_path}/poor.jsonl")
    server.answer = lambda prompt, call: (200, "[[C]]")
    assert judge(tmp_path, server, f"baseline={tmp_path}/poor.jsonl", "judge.suffix=_pairs") == 0.5


def test_outputs_of_other_instructions_are_refused(tmp_path: Path, server: Server) -> None:
    for name, question in (("one", "Sort b a."), ("two", "Sort d c.")):
        (tmp_path / f"{name}.json").write_text(
            json.dumps([{"instruction": question, "output": "x", "generator": name}])
        )
    options = [f"judge.base_url={server.url}", "judge.model=m", f"paths.root={tmp_path}"]
    with pytest.raises(UserError, match="answer different questions"):
        run_entry("judge", [f"answers={tmp_path}/one.json", f"baseline={tmp_path}/two.json", *options])


def test_an_answer_file_with_a_turn_missing_is_refused(tmp_path: Path, server: Server) -> None:
    questions, good, _ = files(tmp_path)
    good.write_text(json.dumps({"question_id": 0, "choices": [{"index": 0, "turns": ["only one"]}]}) + "\n")
    with pytest.raises(UserError, match=r"has 1 answers to the 2 turns of question 0; write it again"):
        run_entry(
            "judge",
            [
                f"answers={good}",
                f"questions={questions}",
                f"judge.base_url={server.url}",
                "judge.model=m",
                f"paths.root={tmp_path}",
            ],
        )
