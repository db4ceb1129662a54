"""examples/python_functions/functions.py: answers scored as Python, and the evaluation that does so."""

import json
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from fusechat.evaluate import EVALUATIONS
from tests.conftest import ROOT, Mini

MODULE = "examples.python_functions.functions"


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(EVALUATIONS, "_members", dict(EVALUATIONS._members))
    sys.modules.pop(MODULE, None)
    yield __import__(MODULE, fromlist=["functions"])
    sys.modules.pop(MODULE, None)


@pytest.mark.parametrize(
    ("answer", "code", "parses"),
    [
        ("def f(a):\n    return a", "def f(a):\n    return a", 1),
        ("Here:\n```python\ndef f(a):\n    return a\n```\nand so on", "def f(a):\n    return a\n", 1),
        ("```\nasync def f():\n    pass", "async def f():\n    pass", 1),
        ("class A:\n    def f(self): ...", "class A:\n    def f(self): ...", 1),
        ("```python\ndef f(a):\n    return (a", "def f(a):\n    return (a", 0),
        ("Sure", "Sure", 0),
        ("def f(a):\n    return '\\d'", "def f(a):\n    return '\\d'", 1),
        ("def f(a): return 'a\0'", "def f(a): return 'a\0'", 0),
        ("", "", 0),
    ],
)
@pytest.mark.filterwarnings("error")
def test_an_answer_as_python(functions: ModuleType, answer: str, code: str, parses: int) -> None:
    assert functions.code_of(answer) == code
    assert functions.scored({"answer": answer, "reference": "def f(a):\n    return a"})["parses"] == parses


def test_chrf_is_of_the_code_alone(functions: ModuleType) -> None:
    reference = "def f(values):\n    return sorted(values)"
    score = lambda answer: functions.scored({"answer": answer, "reference": reference})["chrf"]
    assert score(reference) == score(f"Sure:\n```python\n{reference}\n```") == 100.0
    assert 0.0 < score("def g(items):\n    return sorted(items)") < 100.0 and score("") == 0.0


def test_the_evaluation_adds_two_metrics(functions: ModuleType, fresh: Mini) -> None:
    model = f"model={fresh.experiment}/world/models/pivot"
    names = ["evaluation.kind=functions", "evaluation.file=functions.json", f"imports=[{MODULE}]"]
    fresh.run("evaluate", model, "evaluation.limit=3", *names)
    fresh.run("evaluate", model, "evaluation.limit=3", "evaluation.file=chats.json")
    found, plain = (
        json.loads((fresh.experiment / f"evaluation/{name}.json").read_text()) for name in ("functions", "chats")
    )
    assert set(found["metrics"]) - set(plain["metrics"]) == {"parses", "chrf"}
    assert [sample["answer"] for sample in found["samples"]] == [sample["answer"] for sample in plain["samples"]]
    assert found["metrics"]["chrf"]["all"]["value"] == sum(sample["chrf"] for sample in found["samples"]) / 3
