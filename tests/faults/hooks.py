"""The same as `trace` where strace may not attach: Python's audit events instead of system calls.

Blind to what other languages write, and to the middle of a write; errors are raised where the call would begin.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.stages import Stage, World, exit_code
from tests.faults.trace import Boundary

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def boundaries(world: World, stage: Stage, log: Path) -> tuple[list[Boundary], list[str], list[str]]:
    """As `trace.boundaries`; changes by other threads are not told apart."""
    log.write_text("")
    code = _run(world, stage, lambda name, number, path, changes: _note(log, name, number, path, changes))
    assert code == 0, f"{stage.name}: {world.said()[-2000:]}"
    found, read = [], []
    for line in log.read_text().splitlines():
        name, number, changes, path = line.split("\t")
        if changes == "True":
            found.append(Boundary(name, int(number), path))
        else:
            read.append(path)
    return found, [*dict.fromkeys(read)], []


def disturbed(world: World, stage: Stage, log: Path, boundary: Boundary, fault: str) -> tuple[int, bool]:
    """As `trace.disturbed`."""
    log.write_text("")

    def strike(name: str, number: int, path: str, changes: bool) -> None:
        if changes and (name, number) == (boundary.call, boundary.number):
            _note(log, name, number, path, changes)
            if fault.startswith("SIG"):
                return os.kill(os.getpid(), getattr(signal, fault))
            raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)), path)

    return _run(world, stage, strike), bool(log.read_text())


def _note(log: Path, name: str, number: int, path: str, changes: bool) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, f"{name}\t{number}\t{changes}\t{path}\n".encode())
    os.close(descriptor)


def _run(world: World, stage: Stage, seen: Callable[[str, int, str, bool], None]) -> int:
    counts: Counter[str] = Counter()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        path = os.fsdecode(arguments[0])
        if path.startswith(f"{world.root}/"):
            changes = event != "open" or bool(int(arguments[2] or 0) & WRITING)
            counts[event] += changes
            seen(event, counts[event], path.removeprefix(f"{world.root}/"), changes)

    return exit_code(os.waitpid(world.start(stage, lambda: sys.addaudithook(hook)), 0)[1])
