"""Answer files for llm_judge and alpaca_eval, and the harness."""

import json
from pathlib import Path
from typing import Any

import pytest

from fusechat.app.errors import UserError
from fusechat.evaluate import answers
from fusechat.evaluate.notes import read_note
from fusechat.report.results import compared, read_result
from tests.conftest import Mini

QUESTIONS = [
    {"question_id": 80 + n, "category": category, "turns": [f"Sort c b a {n}.", "And reverse it."]}
    for n, category in enumerate(["writing", "math", "stem", "unheard of"] * 5)
]


def asked(path: Path) -> Path:
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


def test_every_turn_is_asked_at_its_categorys_temperature() -> None:
    seen: list[tuple[float, list[Any]]] = []

    def generate(prompts: list[Any], temperature: float) -> list[str]:
        seen.append((temperature, [[m["content"] for m in prompt] for prompt in prompts]))
        return [f"answer {len(prompt)}" for prompt in prompts]

    records = [*answers.mt_bench_records(QUESTIONS, generate, "model-x")]
    assert [record["question_id"] for record in records] == [question["question_id"] for question in QUESTIONS]
    assert records[0]["choices"] == [{"index": 0, "turns": ["answer 1", "answer 3"]}]
    assert (records[0]["model_id"], set(records[0])) == (
        "model-x",
        {"question_id", "answer_id", "model_id", "choices", "tstamp"},
    )
    assert [(t, len(p)) for t, p in seen[:6]] == [(0.0, 4), (0.1, 4), (0.7, 8)] * 2
    assert seen[3][1][0] == ["Sort c b a 1.", "answer 1", "And reverse it."], (
        "the second turn follows the model's own answer"
    )


def test_mt_bench_files_resume_after_a_kill(fresh: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = asked(fresh.root / "question.jsonl")
    command = [
        "evaluate",
        f"model={fresh.experiment}/world/models/pivot",
        "evaluation=mt_bench",
        f"evaluation.questions={questions}",
        "evaluation.max_new_tokens=4",
    ]
    fresh.run(*command)
    file = fresh.experiment / "evaluation/mt_bench/model_answer/models-pivot.jsonl"
    wanted, mark = file.read_text(), read_note(file.with_suffix(".fingerprint"))["fingerprint"]
    assert len(wanted.splitlines()) == len(QUESTIONS)
    file.unlink()
    lines = wanted.splitlines(keepends=True)
    file.with_suffix(f".{mark}.part").write_text("".join(lines[:18]) + '{"cut')
    calls: list[int] = []
    whole = answers.mt_bench_records
    monkeypatch.setattr(answers, "mt_bench_records", lambda left, *rest: calls.append(len(left)) or whole(left, *rest))
    fresh.run(*command)
    assert (calls, file.read_text()) == ([len(QUESTIONS) - 16], wanted)
    before = file.stat().st_mtime_ns
    fresh.run(*command)
    assert file.stat().st_mtime_ns == before, "answered already"


def test_alpaca_eval_outputs(fresh: Mini) -> None:
    questions = fresh.root / "alpaca.json"
    questions.write_text(
        json.dumps([{"instruction": "Sort b a.", "dataset": "helpful_base"}, {"instruction": "Reverse x y."}])
    )
    fresh.run(
        "evaluate",
        f"model={fresh.experiment}/world/models/a",
        "evaluation=alpaca_eval",
        f"evaluation.questions={questions}",
        "evaluation.max_new_tokens=4",
    )
    rows = json.loads((fresh.experiment / "evaluation/alpaca_eval/models-a.json").read_text())
    assert [set(row) for row in rows] == [
        {"instruction", "output", "generator", "dataset"},
        {"instruction", "output", "generator"},
    ]
    assert rows[0]["generator"] == "models-a"


def test_lines_end_at_newlines_alone_and_a_cut_one_is_dropped(tmp_path: Path) -> None:
    """Answers may hold U+2028, which Python counts as a line's end; a cut may leave a closing brace behind."""
    from fusechat.app.outputs import whole_lines

    rows = [{"answer": "a\u2028b\x85c"}, {"nested": {"x": 1}}]
    file = tmp_path / "x.part"
    file.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '{"nested": {"x": 1}', encoding="utf-8"
    )
    assert whole_lines(file) == rows
    assert whole_lines(file) == rows
    assert file.read_text(encoding="utf-8").count("\n") == 2
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "turns": ["a\u2028b"]}\n', encoding="utf-8")
    assert answers.load_questions(tmp_path / "q.jsonl", "mt_bench")[0]["turns"] == ["a\u2028b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"evaluation\.questions=.* does not exist; download the question file of mt_bench"),
        ('{"question_id": 1}\n', r"question 1: expected the keys question_id, turns of mt_bench"),
        ('{"question_id": 1\n', r"line 1: not JSON"),
    ],
)
def test_bad_question_files(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        answers.load_questions(tmp_path / "q.jsonl", "mt_bench")


TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}, {{metric: acc_norm, aggregation: mean, higher_is_better: true}}]
"""


def test_a_local_task_of_the_harness(fresh: Mini) -> None:
    rows = [{"question": f"Sort b a {n}:", "choices": ["a b", "x"], "answer": n % 2} for n in range(8)]
    (fresh.root / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (fresh.root / "tasks").mkdir()
    (fresh.root / "tasks/letters.yaml").write_text(TASK.format(file=fresh.root / "task.jsonl"))
    options = [
        "evaluation=lm_eval",
        "evaluation.tasks=[letters]",
        f"evaluation.include_path={fresh.root}/tasks",
        "evaluation.device=cpu",
    ]
    for model in ("pivot", "a"):
        fresh.run("evaluate", f"model={fresh.experiment}/world/models/{model}", *options)
    files = [fresh.experiment / f"evaluation/lm_eval/models-{model}.json" for model in ("pivot", "a")]
    content = read_result(files[0])
    before = files[0].stat().st_mtime_ns
    fresh.run("evaluate", f"model={fresh.experiment}/world/models/pivot", *options)
    assert files[0].stat().st_mtime_ns == before, "evaluated already"
    task = fresh.root / "tasks/letters.yaml"
    task.write_text(task.read_text() + "# edited\n")
    fresh.run("evaluate", f"model={fresh.experiment}/world/models/pivot", *options)
    assert files[0].stat().st_mtime_ns > before, "an edited task is another one"
    assert len(content["samples"]) == 8
    assert content["metrics"]["acc"]["all"]["value"] == content["harness"]["letters"]["acc,none"]
    frame = compared(content, read_result(files[1]))
    assert set(frame.metric) == {"acc", "acc_norm"}
    assert set(frame.skill) == {"all", "letters"}
    with pytest.raises(
        UserError, match=r"evaluation\.tasks: the harness knows no task 'arc_chalenge'; near: .*arc_challenge"
    ):
        fresh.run(
            "evaluate",
            f"model={fresh.experiment}/world/models/a",
            "evaluation=lm_eval",
            "evaluation.tasks=[arc_chalenge]",
        )
