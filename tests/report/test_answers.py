"""Answers beside each other in the report."""

from typing import Any

import pandas as pd

from fusechat.report.answers import answers, section, spread


def evaluation(name: str, said: str, **kept: Any) -> dict[str, Any]:
    samples = [
        {"id": f"c{n}", "prompt": f"<b>{n}?", "reference": f"r{n}", "answer": f"{said} {n}", "nats": 1.0}
        for n in range(8)
    ]
    return {"name": name, "folder": "mine", "tests": "t", "samples": samples} | kept


def test_the_same_questions_of_every_model() -> None:
    scored = evaluation("targets-quiet", "-", samples=[{"id": "c0", "nats": 1.0}])
    frame = answers([evaluation("models-pivot", "a"), scored, evaluation("targets-sft", "b\nb")])
    assert frame["question"].tolist() == ["<b>0?"] * 2 + ["<b>4?"] * 2 + ["<b>7?"] * 2
    assert frame["model"].tolist() == ["pivot", "target sft"] * 3
    assert frame["answer"].tolist() == ["a 0", "b\nb 0", "a 4", "b\nb 4", "a 7", "b\nb 7"]
    page = section(frame)
    assert page.count("<dl>") == 3
    assert "&lt;b&gt;4?" in page, "what a model says is text, not markup"
    assert "<dt>reference<dd>r4<dt>pivot<dd>a 4<dt>target sft<dd>b\nb 4" in page
    assert "(mine)" not in page


def test_experiments_are_told_apart_and_no_answers_are_no_section() -> None:
    frame = answers([evaluation("models-pivot", "a"), evaluation("models-pivot", "b", folder="other")])
    page = section(frame)
    assert page.count("<dl>") == 6
    assert "&lt;b&gt;0? (mine)" in page
    assert "&lt;b&gt;0? (other)" in page
    assert section(answers([])) == section(pd.DataFrame()) == ""


def test_first_middle_and_last() -> None:
    assert [spread(range(n)) for n in (0, 1, 2, 3, 200)] == [[], [0], [0, 1], [0, 1, 2], [0, 100, 199]]
