"""Judging answers with a language model behind an OpenAI-compatible endpoint: grades, or pairs in both orders.

The prompts are ours: grades are comparable among models judged here, not with published ones. For those, give the answer
files to FastChat's llm_judge or to alpaca_eval.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fusechat.app.errors import UserError

GRADE = """You grade the last answer of an AI assistant in the conversation below. Look at whether it is correct, does what was
asked, is complete and clear; length by itself earns nothing.{reference}

{conversation}

Say in two or three sentences what is good and bad about the last answer. Then end with its grade from 1 (useless) to 10
(nothing left to wish for) in double brackets, like this: [[5]]"""
PAIR = """Two AI assistants were asked the same. Decide whose last answer is better: correct, doing what was asked, complete and
clear. Neither the order nor the length of the answers is an argument.{reference}

=== Assistant A ===
{conversation}

=== Assistant B ===
{other}

Say in two or three sentences why. Then end with your verdict in double brackets: [[A]], [[B]], or [[C]] for a tie."""
BUSY = (429, 500, 502, 503, 504)
VERDICTS = {"A": 1.0, "B": 0.0, "C": 0.5}
Turns = list[tuple[str, str]]


@dataclass(frozen=True)
class Task:
    """One judgement: key (unique), the conversation up to the judged answer, the other one's in pairs, and whether they were swapped."""

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
    """A chat endpoint. Raises `UserError` where it refuses, or fails more often than ``retries`` in a row."""

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
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3 import Retry

        again = Retry(
            retries,
            backoff_factor=wait,
            backoff_jitter=wait,
            status_forcelist=BUSY,
            allowed_methods=None,
            raise_on_status=False,
        )
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=again, pool_maxsize=64))
        if key:
            self.session.headers["Authorization"] = f"Bearer {key}"
        self.base_url, self.retries, self.tries = base_url.rstrip("/"), retries, tries
        self.options = {"model": model, "temperature": temperature, "max_tokens": max_tokens}

    def __call__(self, task: Task) -> dict[str, Any]:
        """The judgement of a task; value None where the judge answered garbage ``tries`` times."""
        verdict = ""
        for _ in range(self.tries):
            verdict = self._ask(task.prompt)
            if (value := task.value(verdict)) is not None:
                return {"key": task.key, "sample": task.sample, "tag": task.tag, "value": value, "verdict": verdict}
        return {"key": task.key, "sample": task.sample, "tag": task.tag, "value": None, "verdict": verdict}

    def _ask(self, prompt: str) -> str:
        """The model's text; empty where the body is no completion."""
        import requests

        body = {"messages": [{"role": "user", "content": prompt}], **self.options}
        kept = f"failed {self.retries + 1} times; judgements so far are kept: run the same command again"
        try:
            response = self.session.post(f"{self.base_url}/chat/completions", json=body, timeout=120)
        except requests.RequestException as error:
            raise UserError(f"the judge at {self.base_url} {kept} ({type(error).__name__})") from error
        if response.status_code in BUSY:
            raise UserError(f"the judge at {self.base_url} {kept} (status {response.status_code})")
        if response.status_code != 200:
            raise UserError(
                f"the judge at {self.base_url} refuses ({response.status_code}): {response.text[:200]!r}; see judge.key_env"
            )
        try:
            return str(response.json()["choices"][0]["message"]["content"])
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
            about: dict[str, Any] = {
                "sample": sample,
                "tag": tags.get(name, ""),
                "turns": turns[:n],
                "reference": "".join(reference),
            }
            for repeat in range(repeats):
                if others is None:
                    yield Task(f"{sample}/{repeat}", **about)
                    continue
                for swapped in (False, True):
                    yield Task(
                        f"{sample}/{repeat}/{'BA' if swapped else 'AB'}",
                        other=others[name][:n],
                        swapped=swapped,
                        **about,
                    )


def judge_all(todo: Sequence[Task], judge: Callable[[Task], dict[str, Any]], parallel: int) -> Iterator[dict[str, Any]]:
    """Judgements in the order of the tasks, several under way at a time. After the first that fails none is begun."""
    failed = threading.Event()

    def one(task: Task) -> dict[str, Any] | None:
        if failed.is_set():
            return None  # never read: the failure before it ends the iteration
        try:
            return judge(task)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(parallel) as pool:
        try:
            yield from (found for found in pool.map(one, todo) if found is not None)
        finally:
            failed.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _shown(turns: Turns) -> str:
    return "\n\n".join(f"[User]\n{question}\n\n[Assistant]\n{answer}" for question, answer in turns)
