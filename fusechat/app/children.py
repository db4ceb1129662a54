"""A step's process: what it is given, started, waited for, and ended with the command that started it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence

from fusechat.app.command import PARENT
from fusechat.app.ending import Ended
from fusechat.app.hints import config_folders, task_overrides

GRACE = 60.0  # seconds in which a step may end by itself after Ctrl-C; a training writes a checkpoint
QUIET = ["hydra.output_subdir=null"]  # no folder of Hydra's own; a log beside the metrics
QUIET += [f"hydra.{key}=${{paths.logs}}/commands" for key in ("run.dir", "sweep.dir")] + ["hydra.sweep.subdir=."]


def passed_on(*but: str) -> tuple[list[str], list[str]]:
    """What a command was given and passes on to its steps: overrides, and options. but: what keys begin with that are
    its own.
    """
    kept = [override for override in task_overrides() if not override.lstrip("+~").startswith(but)]
    return kept, [part for folder in config_folders() for part in ("--config-dir", str(folder))]


def run_child(command: Sequence[str], timeout: float | None = None) -> int:
    """Runs a command to its end, output passed through, and returns its exit code. Ctrl-C ends it too.

    timeout: seconds after which it is ended. Raises `TimeoutError` then.
    """
    child = subprocess.Popen(command, env=os.environ | {PARENT: str(os.getpid())})
    try:
        code = child.wait(timeout)
    except BaseException as error:
        late = isinstance(error, subprocess.TimeoutExpired)
        if late or (isinstance(error, Ended) and error.code == 128 + signal.SIGTERM):
            child.terminate()  # only this process has got it
        _end(child)
        if late:
            raise TimeoutError from None
        raise
    if code in (130, -signal.SIGINT):
        raise Ended(signal.SIGINT)
    return code


def ended(code: int) -> str:
    """An exit code in words."""
    return f"failed (exit code {code})" if code > 0 else f"was ended by signal {-code} ({signal.Signals(-code).name})"


def _end(child: subprocess.Popen[bytes]) -> None:
    """A terminal's Ctrl-C reaches the child as well: it has a while to end by itself."""
    for stop in (child.terminate, child.kill):
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            stop()
    child.wait()
