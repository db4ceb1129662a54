"""How far a long work is: one live bar in a terminal; elsewhere (nohup, SLURM, CI) a line at most every half minute.

Both say the same: how many of how many, the rate, what the work tells of itself, and the time that is left. What
`fusechat status` says of it from another terminal is noted beside the output's lock, every few seconds.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fusechat.app.locks import note

LOG = logging.getLogger(__name__)
LINES, FRAMES, NOTES = 30.0, 0.5, 5.0  # seconds between two lines, two looks at a bar, two notes for others
MEGABYTE = 10**6
Told = Callable[[], str]  # asked only when it is shown: what is on a device is not waited for otherwise


class Progress:
    """Counts; shows. Called with what has been done since the last call, and with a text about it."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0, bar: Any = None) -> None:
        self.what, self.total, self.unit, self.first, self.done, self.bar = what, total, unit, done, done, bar
        self.began = self.shown = self.noted = time.monotonic()
        self.task = bar.add_task(what, total=total, completed=done, told="") if bar is not None else None

    def __call__(self, count: int = 1, told: Told | None = None) -> None:
        """``count`` more are done."""
        self.done += count
        now = time.monotonic()
        if now - self.noted >= NOTES:
            self.noted = now
            note(f"{self._share()}, {self._rate(now)}, {self._left(now)}")
        if now - self.shown < (LINES if self.bar is None else FRAMES):
            return
        self.shown = now
        texts = ", ".join([self._rate(now), *([text] if told is not None and (text := told()) else [])])
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, told=texts)
            return
        LOG.info("%s: %s, %s, %s", self.what, self._share(), texts, self._left(now))

    def _share(self) -> str:
        return f"{self.done:,} of {self.total:,} {self.unit} ({100 * self.done / max(1, self.total):.0f} %)"

    def _rate(self, now: float) -> str:
        return f"{self._per_second(now):,.1f} {self.unit}/s"

    def _left(self, now: float) -> str:
        rate = self._per_second(now)
        return f"{spell((self.total - self.done) / rate) if rate > 0 else 'unknown time'} left"

    def _per_second(self, now: float) -> float:
        return (self.done - self.first) / max(1e-9, now - self.began)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began


@contextmanager
def progress(what: str, total: int, unit: str, done: int = 0, *, bar: bool = True) -> Iterator[Progress]:
    """`Progress` for the time of a block. done: of earlier runs; bar: False shows lines in a terminal too."""
    if not (bar and in_terminal()):
        yield Progress(what, total, unit, done)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    told = TextColumn("{task.fields[told]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), told, TimeRemainingColumn())
    with Bar(*columns, transient=True, console=Console(stderr=True)) as shown, _above_the_bar():
        yield Progress(what, total, unit, done, shown)


@contextmanager
def bytes_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """`progress` in megabytes; total, and what is called with, are bytes."""
    left = 0
    with progress(what, max(1, total // MEGABYTE), "MB") as tell:

        def count(number: int) -> None:
            nonlocal left
            whole, left = divmod(left + number, MEGABYTE)
            tell(whole)

        yield count


def in_terminal() -> bool:
    """Whether somebody sees a bar."""
    return sys.stderr is not None and sys.stderr.isatty()


def spell(seconds: float) -> str:
    """A time in words: 12 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def _above_the_bar() -> Iterator[None]:
    """What is logged goes through rich, which has put itself in the place of stderr and writes above the bar."""
    handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
    before = {h: h.stream for h in handlers if h.stream in (sys.__stderr__, sys.__stdout__)}
    for handler in before:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler, stream in before.items():
            handler.setStream(stream)
