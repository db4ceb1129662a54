"""Judging answers with a language model behind an OpenAI-compatible endpoint: grades, or pairs in both orders.

The prompts are ours: grades are comparable among models judged here, not with published ones. For those, give the
answer files to FastChat's llm_judge or to alpaca_eval.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusechat.app.errors import UserError
from fusechat.app.settings import check
from fusechat.judge.files import Turns

if TYPE_CHECKING:
    import httpx

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
BUSY = (429, 500, 502, 503, 504)
LONGEST = 120.0  # seconds between two attempts
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

    retries: how often a request is sent again after 429, 5xx and broken connections; wait: seconds before the first
    time, twice as many before each next one, and up to ``wait`` more by chance. tries: how often the judge is asked
    again where its answer holds no grade. Raises `UserError` where it refuses, or fails more often than that.
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
        import httpx

        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(headers=headers, timeout=120, limits=httpx.Limits(max_connections=None))
        self.base_url, self.retries, self.wait, self.tries = base_url.rstrip("/"), retries, wait, tries
        self.options = {"model": model, "temperature": temperature, "max_tokens": max_tokens}

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()

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
        response = self._send({"messages": [{"role": "user", "content": prompt}], **self.options})
        if response.status_code != 200:
            told = f"({response.status_code}): {response.text[:200]!r}; see judge.key_env"
            raise UserError(f"the judge at {self.base_url} refuses {told}")
        try:
            return str(response.json()["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError):
            return ""

    def _send(self, body: dict[str, Any]) -> httpx.Response:
        import httpx

        reason = ""
        for attempt in range(self.retries + 1):
            asked_to_wait = 0.0
            try:
                response = self.client.post(f"{self.base_url}/chat/completions", json=body)
                if response.status_code not in BUSY:
                    return response
                reason = f"status {response.status_code}"
                after = response.headers.get("Retry-After", "")
                asked_to_wait = float(after) if after.isdigit() else 0.0
            except httpx.RequestError as error:
                reason = type(error).__name__
            if attempt < self.retries:
                pause = self.wait * 2**attempt + random.uniform(0, self.wait)
                time.sleep(min(LONGEST, max(pause, asked_to_wait)))
        kept = f"failed {self.retries + 1} times; judgements so far are kept: run the same command again"
        raise UserError(f"the judge at {self.base_url} {kept} ({reason})")


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
