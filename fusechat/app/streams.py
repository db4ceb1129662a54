"""Whoever reads what a command prints may be gone before it ends (``| head``)."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Parser(argparse.ArgumentParser):
    """A parser whose help is printed like anything else: argparse is silent where it could not be written."""

    def print_help(self, file: Any = None) -> None:
        """The whole help, on stdout."""
        print(self.format_help(), end="", file=file)


@contextmanager
def read() -> Iterator[None]:
    """What is printed in the block is with its reader after it; where that is gone, the process ends without a word.

    Its exit code is then that of any program of a pipe (141). Raises `OSError` for what a full disk does to a file;
    what could not be written is let go.
    """
    try:
        try:
            yield
        except SystemExit:
            _flush()
            raise
        _flush()
    except BrokenPipeError:
        if not _gone():
            raise
        _let_go()
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError:
        try:
            _flush()
        except OSError:
            _let_go()
        raise


def _flush() -> None:
    if sys.stdout is not None:  # closed before we began
        sys.stdout.flush()


def _let_go() -> None:
    """Python flushes once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _gone() -> bool:
    """Whether nobody reads stdout: a broken pipe may be another."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))
