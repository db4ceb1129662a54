"""Two processes on one output: the first goes on, the second is told who holds it, or waits.

The lock is a file beside the output that names host, process and its start (`filelock.SoftFileLock`, which also works
where a network file system knows no locks). It is dead only if it is of this host and that process is gone.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fusechat.app.ending import to_undo
from fusechat.app.errors import HELD, UserError
from fusechat.app.rank import is_first

if TYPE_CHECKING:
    from filelock import SoftFileLock

LOG = logging.getLogger(__name__)
OWN = "FUSECHAT_OUTPUTS"  # outputs that this process holds: child processes work on them for it
UNFILLED = 2.0  # seconds that a lock's file may be empty
DEAD = 0.5  # seconds that taking over a dead process's lock may need
_WAITING: ContextVar[bool] = ContextVar("waiting", default=False)


@contextmanager
def waiting(wait: bool) -> Iterator[None]:
    """Within the block, a stage waits for the process that holds its output (``wait=true``) instead of giving up."""
    token = _WAITING.set(wait)
    try:
        yield
    finally:
        _WAITING.reset(token)


@contextmanager
def held(output: Path, choose: str = "choose another place") -> Iterator[bool]:
    """Holds ``output`` for the time of the block. False where a parent process or the first rank does already.

    choose: the end of the message where it cannot be written. Folders that are made for the lock alone go again.
    Raises `UserError` where another process holds the output (exit code 3) or nothing can be written beside it.
    """
    own = os.environ.get(OWN, "").split(os.pathsep)
    if str(output) in own or not is_first():
        yield False
        return
    new = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(output)
    except OSError as error:
        _remove_empty(new)
        raise UserError(f"{output} cannot be written ({error.strerror}: {error.filename}); {choose}") from error
    except BaseException:
        _remove_empty(new)
        raise
    _remove_note(output)  # of a process that was killed
    os.environ[OWN] = os.pathsep.join([*filter(None, own), str(output)])

    def let_go() -> None:
        _remove_note(output)
        lock.release()
        _remove_empty(new)

    to_undo.append(let_go)
    try:
        yield True
    finally:
        left = [path for path in os.environ[OWN].split(os.pathsep) if path != str(output)]
        os.environ[OWN] = os.pathsep.join(left)
        let_go()
        to_undo.remove(let_go)


def _locked(output: Path) -> SoftFileLock:
    from filelock import SoftFileLock, Timeout

    lock = SoftFileLock(_lock_of(output), timeout=DEAD, poll_interval=0.05)
    _remove_unfilled(Path(lock.lock_file))
    try:
        lock.acquire()
    except Timeout:
        told = f"{output} is being written by another process ({holder(output) or 'just beginning or ending'})"
        if not _WAITING.get():
            hint = f"wait=true waits for it; if that host is gone, remove {lock.lock_file}"
            raise UserError(f"{told}; {hint}", code=HELD) from None
        LOG.info("waiting: %s", told)
        lock.acquire(timeout=-1, poll_interval=1.0)
    return lock


def _remove_unfilled(file: Path) -> None:
    """Removes a lock that stays empty: its process was killed between making it and writing its name into it."""
    began = time.monotonic()  # the file's own time may be another host's, or from before the clock was set
    with suppress(FileNotFoundError):
        while file.stat().st_size == 0:
            if time.monotonic() - began > UNFILLED:
                file.unlink()
            time.sleep(0.05)


@dataclass(frozen=True)
class Holder:
    """Who holds an output. since: seconds since 1970."""

    pid: int
    host: str
    since: float

    @property
    def gone(self) -> bool:
        """Whether it is known to run no more: only of this host that can be said."""
        if self.host.partition("?")[0] != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"host {self.host}, pid {self.pid}, since {since}"


def holder(output: Path) -> Holder | None:
    """Who holds an output, as its lock says; None where nobody does, or one is just beginning or ending."""
    file = _lock_of(output)
    try:
        pid, host, *_ = file.read_text().split("\n")
        return Holder(int(pid), host, file.stat().st_mtime)
    except (OSError, ValueError):
        return None


def note(text: str) -> None:
    """How far the work on an output is, left beside its lock: the output that this process, or a parent, took last.

    Nothing where none is held, and none that cannot be written: the work does not end for it.
    """
    output = os.environ.get(OWN, "").rpartition(os.pathsep)[2]
    with suppress(OSError):
        if output:
            _note_of(Path(output)).write_text(text)


def noted(output: Path) -> str:
    """The last `note` of an output with its time; empty where there is none."""
    file = _note_of(output)
    try:
        text, moment = file.read_text(), file.stat().st_mtime
    except OSError:
        return ""
    return f"{text} (at {time.strftime('%H:%M:%S', time.localtime(moment))})" if text else ""


def _note_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.progress")


def _remove_note(output: Path) -> None:
    with suppress(OSError):
        _note_of(output).unlink(missing_ok=True)


def _lock_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


def _remove_empty(folders: Sequence[Path]) -> None:
    """Removes folders, innermost first, up to the first that something lies in."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
