"""Judging answers with a language model behind an OpenAI-compatible endpoint: grades, or pairs in both orders.

The prompts are ours: grades are comparable among models judged here, not with published ones. For those, give the
answer files to FastChat's llm_judge or to alpaca_eval.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fusechat.app.endpoint import Endpoint
from fusechat.app.settings import check
from fusechat.judge.files import Turns

GRADE = """\
You grade the last answer of an AI assistant in the conversation below. Look at whether it is correct, does what was
asked, is complete and clear; length by itself earns nothing.{reference}

{conversation}

Say in two or three sentences what is good and bad about the last answer. Then end with its grade from 1 (useless) to 10
(nothing left to wish for) in double brackets, like this: [[5]]"""
PAIR = """\
Two AI assistants were asked the same. Decide whose last answer is better: correct, doing what was asked, complete and
clear. Neither the order nor the length of the answers is an argument.{reference}

=== Assistant A ===
{conversation}

=== Assistant B ===
{other}

Say in two or three sentences why. Then end with your verdict in double brackets: [[A]], [[B]], or [[C]] for a tie."""
VERDICTS = {"A": 1.0, "B": 0.0, "C": 0.5}


@dataclass(frozen=True)
class Task:
    """One judgement. key: unique; turns: the conversation up to the judged answer; other: the other model's, in pairs;
    swapped: the other model's is shown first."""

    key: str
    sample: str
    tag: str
    turns: Turns
    other: Turns | None = None
    swapped: bool = False
    reference: str = ""

    @property
    def prompt(self) -> str:
        """What the judge reads."""
        first, second = (self.other, self.turns) if self.swapped else (self.turns, self.other)
        reference = f"\n\nA reference answer: {self.reference}" if self.reference else ""
        if self.other is None:
            return GRADE.format(reference=reference, conversation=_shown(self.turns))
        return PAIR.format(reference=reference, conversation=_shown(first or []), other=_shown(second or []))

    def value(self, verdict: str) -> float | None:
        """The grade, or 1 (better), 0.5, 0 (worse) in pairs; None where the judge's text holds neither."""
        if self.other is None:
            found = re.findall(r"\[\[(\d+(?:\.\d+)?)\]\]", verdict)
            return float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else None
        marks = re.findall(r"\[\[([ABC])\]\]", verdict)
        return (1 - VERDICTS[marks[-1]] if self.swapped else VERDICTS[marks[-1]]) if marks else None


class Judge:
    """A chat endpoint, for several threads at a time; closes its connections at the end of a with block.

    retries, wait: of an `Endpoint`. tries: how often the judge is asked again where its answer holds no grade. Raises
    `UserError` where it refuses, or fails more often than that.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str | None,
        *,
        temperature: float,
        max_tokens: int,
        retries: int,
        wait: float,
        tries: int,
    ) -> None:
        check("judge", base_url=base_url, model=model, temperature=temperature, max_tokens=max_tokens)
        check("judge", retries=retries, wait=wait, tries=tries)
        kept = "judgements so far are kept"
        self.endpoint = Endpoint(base_url, key, "judge", retries=retries, wait=wait, who="the judge", kept=kept)
        self.tries = tries
        self.options = {"model": model, "temperature": temperature, "max_tokens": max_tokens}

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: object) -> None:
        self.endpoint.__exit__(*error)

    def __call__(self, task: Task) -> dict[str, Any]:
        """The judgement of a task; value None where the judge answered garbage ``tries`` times."""
        verdict, value = "", None
        for _ in range(self.tries):
            verdict = self._ask(task.prompt)
            value = task.value(verdict)
            if value is not None:
                break
        return {"key": task.key, "sample": task.sample, "tag": task.tag, "value": value, "verdict": verdict}

    def _ask(self, prompt: str) -> str:
        """The model's text; empty where the body is no completion."""
        body = {"messages": [{"role": "user", "content": prompt}], **self.options}
        answer = self.endpoint.post("/chat/completions", body)
        try:
            return str(json.loads(answer)["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError):
            return ""


def tasks(
    answers: dict[str, Turns],
    others: dict[str, Turns] | None,
    tags: dict[str, str],
    references: dict[str, list[str]],
    repeats: int,
) -> Iterator[Task]:
    """Every judged turn, ``repeats`` times; in pairs in both orders."""
    for name, turns in answers.items():
        for n in range(1, len(turns) + 1):
            sample, reference = f"{name}/{n}", (references.get(name) or [""] * n)[n - 1 : n]
            about: dict[str, Any] = {"sample": sample, "tag": tags.get(name, ""), "turns": turns[:n]}
            about["reference"] = "".join(reference)
            for repeat in range(repeats):
                if others is None:
                    yield Task(f"{sample}/{repeat}", **about)
                    continue
                for order in ("AB", "BA"):
                    pair: dict[str, Any] = {"other": others[name][:n], "swapped": order == "BA"}
                    yield Task(f"{sample}/{repeat}/{order}", **pair, **about)


def _shown(turns: Turns) -> str:
    return "\n\n".join(f"[User]\n{question}\n\n[Assistant]\n{answer}" for question, answer in turns)
