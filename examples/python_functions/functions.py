"""Greedy answers as Python: the share that parses, chrF to the reference, and all that evaluation=default measures.

python -m fusechat.evaluate --config-dir examples/python_functions experiment=python_functions model=DIR \
'imports=[examples.python_functions.functions]' evaluation.kind=functions evaluation.generate=true
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sacrebleu.metrics import CHRF

from fusechat.evaluate import EVALUATIONS
from fusechat.evaluate.kinds import Job, Work

FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.S)
SCORE = CHRF()


@EVALUATIONS.register("functions", "chats whose answers are Python: share that parses, chrF to the reference")
def functions(job: Job) -> Work:
    """The work of ``chats`` with two more numbers a sample."""
    work: Work = EVALUATIONS["chats"].function(job)

    def measure(part: Path) -> Mapping[str, Any]:
        found = work.measure(part)
        return {**found, "samples": [scored(sample) for sample in found["samples"]]}

    return replace(work, measure=measure)


def scored(sample: Mapping[str, Any]) -> dict[str, Any]:
    """With ``parses``, 0 or 1, and ``chrf``, 0 to 100 (Popović 2015, by sacrebleu), of the code that it answers."""
    code = code_of(sample["answer"])
    return {**sample, "parses": parses(code), "chrf": SCORE.sentence_score(code, [sample["reference"]]).score}


def code_of(answer: str) -> str:
    """What stands in its first fence, which an answer cut short may leave open; all of it where there is none."""
    fence = FENCED.search(answer)
    return fence[1] if fence else answer


def parses(code: str) -> int:
    """1 for Python that defines a function; prose may be Python too."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes
            tree = ast.parse(code)
    except (SyntaxError, ValueError):  # null bytes
        return 0
    return int(any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(tree)))
