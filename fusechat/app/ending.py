"""How a process ends when it is told to: Ctrl-C and SIGTERM become an exception, so that locks and temporary files go.

Python runs a signal's handler between any two steps of a program. Within an import an exception would leave a library
half there, which hangs or fails when it is torn down: there the process ends at once, and what files say stands as
after a kill. In a finaliser, or in a block that takes every exception, it would be lost: it is raised again.
"""

from __future__ import annotations

import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

WHOLE = "the same command goes on from what is whole"
NUMBERS = (signal.SIGINT, signal.SIGTERM)
AGAIN = 0.1  # seconds between two looks whether the process is ending
IMPORTING = "<frozen importlib._bootstrap>"


class Ended(SystemExit):
    """A signal has come: exit code 130 after Ctrl-C, 143 after SIGTERM. kept: what is kept and how to go on.

    No KeyboardInterrupt, of which libraries make exits of their own.
    """

    def __init__(self, number: int, kept: str = WHOLE) -> None:
        super().__init__(128 + number)
        self.kept = kept

    def __str__(self) -> str:
        return f"{'interrupted' if self.code == 128 + signal.SIGINT else 'ended by SIGTERM'}; {self.kept}"


to_undo: list[Callable[[], object]] = []  # what is left to do where a process ends within an import
_come: list[int] = []  # signals that were to end this process
_on_its_way: list[weakref.ref[Ended]] = []  # what was raised last


def at_once() -> None:
    """Ctrl-C and SIGTERM end this process at once and without a word: nothing is begun yet, or all is done."""
    for number in NUMBERS:
        signal.signal(number, lambda number, frame: os._exit(128 + number))


def with_care() -> None:
    """Ctrl-C and SIGTERM end this process by `Ended`; a second one at once.

    SLURM's requeue signal is for trainings, which take it up.
    """
    for number in NUMBERS:
        signal.signal(number, _begin)
    if "SLURM_JOB_ID" in os.environ:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@contextmanager
def heeded() -> Iterator[None]:
    """`with_care` for the time of a command, which tells what is kept."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    with_care()
    try:
        try:
            yield
        except Exception:
            check_ended()
            raise
    except Ended as ended:
        print(ended, file=sys.stderr)
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def check_ended() -> None:
    """Raises `Ended` where a signal has come: a library that it broke into may make another error of it."""
    if _come:
        raise Ended(_come[0])


def _begin(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    _come.append(number)
    hook = sys.unraisablehook
    sys.unraisablehook = lambda lost: None if isinstance(lost.exc_value, Ended) else hook(lost)
    signal.signal(signal.SIGALRM, lambda _, frame: _end(number, frame))
    signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
    _end(number, frame)


def _end(number: int, frame: FrameType | None) -> None:
    """Raises `Ended`, unless it is on its way already; leaves within an import, or waits while wandb is at work."""
    importing = _importing(frame)
    if importing and "wandb" not in sys.modules:
        _leave(number)
    if importing or (_on_its_way and _on_its_way[0]() is not None):
        return
    ended: Any = Ended(number)
    _on_its_way[:] = [weakref.ref(ended)]
    try:
        raise ended
    finally:
        del ended, frame  # else its traceback, in which this frame is, would keep it


def _leave(number: int) -> NoReturn:
    """Ends this process without what Python does at its end."""
    for undo in reversed(to_undo):
        with suppress(OSError):
            undo()
    print(Ended(number), file=sys.stderr, flush=True)
    os._exit(128 + number)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            return True
        frame = frame.f_back
    return False
