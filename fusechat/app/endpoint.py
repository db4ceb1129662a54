"""An OpenAI-compatible server over HTTP: asked again where it is busy, many requests under way."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fusechat.app.errors import UserError

LOG = logging.getLogger(__name__)
BUSY = (429, 500, 502, 503, 504)
LONGEST = 120.0  # seconds between two attempts
SHOWN = 200  # characters of what a server says that a message shows
T = TypeVar("T")
R = TypeVar("R")


class Endpoint:
    """A server, for several threads at a time; closes its connections at the end of a with block.

    base_url: up to and with /v1; key: its bearer token, told to nobody else. section: of the config, whose keys mend
    what fails; who: what messages call it; kept: what a failure leaves whole. retries: how often a request is sent
    again after 429, 5xx, broken connections and ``timeout`` seconds; wait: seconds before the first time, twice as many
    before each next one, and up to ``wait`` more by chance.
    """

    def __init__(
        self,
        base_url: str,
        key: str | None,
        section: str,
        *,
        retries: int,
        wait: float,
        kept: str,
        who: str = "the server",
        timeout: float = 120.0,
        remedies: Mapping[int, str] | None = None,
    ) -> None:
        import httpx

        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(headers=headers, timeout=timeout, limits=httpx.Limits(max_connections=None))
        self.base_url, self.retries, self.wait = base_url.rstrip("/"), retries, wait
        self.name, self.kept, self._told = f"{who} at {self.base_url}", kept, False
        denied, place = f"see {section}.key_env", f"see {section}.base_url and {section}.model"
        self.remedies = {401: denied, 403: denied, 404: place, **(remedies or {})}

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()

    def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """What it answers. Raises `UserError` where it refuses, or fails more often than ``retries``."""
        status, content = self.send("POST", path, body)
        if status != 200:
            raise self.refused(status, content)
        return content

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """Status and content of any answer but those of a busy server."""
        import httpx

        reason = ""
        for attempt in range(self.retries + 1):
            asked_to_wait = 0.0
            try:
                response = self.client.request(method, f"{self.base_url}{path}", json=body)
                if response.status_code not in BUSY:
                    return response.status_code, response.content
                reason = f"(status {response.status_code}){_said(response.content)}"
                after = response.headers.get("Retry-After", "")
                asked_to_wait = float(after) if after.isdigit() else 0.0
            except httpx.RequestError as error:
                reason = f"({type(error).__name__})"
            if attempt < self.retries:
                self._tell(reason)
                pause = self.wait * 2**attempt + random.uniform(0, self.wait)
                time.sleep(min(LONGEST, max(pause, asked_to_wait)))
        failed = f"{self.name} failed {self.retries + 1} times"
        raise UserError(f"{failed}; {self.kept}: run the same command again {reason}")

    def refused(self, status: int, content: bytes) -> UserError:
        """What to say of an answer that is none."""
        remedy = self.remedies.get(status)
        return UserError(f"{self.name} refuses ({status}){_said(content)}" + (f"; {remedy}" if remedy else ""))

    def _tell(self, reason: str) -> None:
        if not self._told:
            self._told = True
            LOG.warning("%s does not answer %s; asked again, up to %d times", self.name, reason, self.retries)


def in_flight(work: Callable[[T], R], todo: Sequence[T], parallel: int) -> Iterator[R]:
    """What ``work`` makes of each, which is never None, in order; ``parallel`` under way at a time.

    After the first that fails none is begun.
    """
    failed = threading.Event()

    def one(task: T) -> R | None:
        if failed.is_set():
            return None  # never read: the failure before it ends the iteration
        try:
            return work(task)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(parallel) as pool:
        try:
            yield from (found for found in pool.map(one, todo) if found is not None)
        finally:
            failed.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _said(content: bytes) -> str:
    """An answer's first characters, in one line."""
    text = " ".join(content[: 4 * SHOWN].decode(errors="replace").split())
    return f": {text[:SHOWN]!r}" if text else ""
