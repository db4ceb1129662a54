"""Boundaries of a stage by strace: every call that changes a file, and faults injected into the one that is wanted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.stages import Stage, World, exit_code, stop

CHANGING = "openat,write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,"
CHANGING += "link,linkat,symlink,ftruncate,sendfile,copy_file_range,fallocate"
FAULTS = {"SIGKILL": "signal=SIGKILL", "ENOSPC": "error=ENOSPC", "EIO": "error=EIO", "EDQUOT": "error=EDQUOT"}
RANDOM = re.compile(r"\d+|(?<=\.tmp)\w{6}")  # in temporary names
CALL = re.compile(r"^(\d+) +(\w+)\((.*)")


@dataclass(frozen=True)
class Boundary:
    """The ``number``-th call of ``call`` by the main thread, and the file that it changes."""

    call: str
    number: int
    path: str


def possible() -> bool:
    """Whether strace is there and may attach."""
    try:
        return subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def traced(world: World, stage: Stage, log: Path, *options: str) -> int:
    """Runs a stage under strace, attached after the fork; returns its exit code."""
    pid = world.start(stage, stop)
    os.waitpid(pid, os.WUNTRACED)
    command = ["strace", "-q", "-y", "-s", "0", "-o", str(log), "-p", str(pid), *options]
    tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    status = Path(f"/proc/{pid}/status")
    while "TracerPid:\t0\n" in status.read_text():
        time.sleep(0.002)
    os.kill(pid, signal.SIGCONT)
    code = exit_code(os.waitpid(pid, 0)[1])
    tracer.wait()
    return code


def boundaries(world: World, stage: Stage, log: Path) -> tuple[list[Boundary], list[str], list[str]]:
    """Every change of a file below the root by the main thread, files read there, and changes by other threads."""
    code = traced(world, stage, log, "-f", "-e", f"trace={CHANGING}")
    assert code == 0, f"{stage.name}: {world.said()[-2000:]}"
    counts: Counter[str] = Counter()
    found, read, others, main = [], [], [], None
    for line in log.read_text(errors="replace").splitlines():
        if (call := CALL.match(line)) is None:
            continue
        thread, name, rest = call.groups()
        main = main or thread
        if thread == main:
            counts[name] += 1
        for path, changes in _touched(name, rest, str(world.root)):
            if changes and thread == main:
                found.append(Boundary(name, counts[name], path))
            elif changes:
                others.append(f"{name} {path}")
            elif "ENOENT" not in rest and "O_DIRECTORY" not in rest:
                read.append(path)
    return found, [*dict.fromkeys(read)], others


def _touched(name: str, rest: str, root: str) -> Iterator[tuple[str, bool]]:
    """The file below the root that a call names, if any, and whether it may change it."""
    if at := re.search(rf'{re.escape(root)}/([^">]*)', rest):
        reading = name == "openat" and not re.search(r"O_(WRONLY|RDWR|CREAT|TRUNC)", rest)
        yield at[1], not reading


def disturbed(world: World, stage: Stage, log: Path, boundary: Boundary, fault: str) -> tuple[int, bool]:
    """Runs a stage with a fault at a boundary; returns its exit code, and whether the fault met the file meant."""
    inject = f"inject={boundary.call}:{FAULTS[fault]}:when={boundary.number}"
    code = traced(world, stage, log, "-e", f"trace={boundary.call}", "-e", inject)
    lines = log.read_text(errors="replace").splitlines()
    if fault == "SIGKILL":
        calls = [line for line in lines if line.startswith(f"{boundary.call}(")]
        return code, code == -signal.SIGKILL and len(calls) == boundary.number and _same(calls[-1], boundary.path)
    return code, any("INJECTED" in line and _same(line, boundary.path) for line in lines)


def _same(line: str, path: str) -> bool:
    """Whether a line names the path, whatever numbers are in a temporary name."""
    folded = [RANDOM.sub("N", text) for text in (path, line)]
    return folded[0] in folded[1]
