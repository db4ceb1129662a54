"""Hashes that outlive a process: of files without a checksum of their own, and, with ``verify=cached``, of all.

One line a file in ``$FUSECHAT_CACHE/checksums.jsonl`` (``~/.cache/fusechat``), appended to; the last of a path counts.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from fusechat.app.errors import UserError, one_of
from fusechat.app.sealed import seal, unsealed

_settings = {"cached": False}


@dataclass(frozen=True)
class Known:
    """A file as it was when its content had the hash ``xxh3_128``. bytes, mtime_ns, inode: as `os.stat` has them."""

    path: str
    bytes: int
    mtime_ns: int
    inode: int
    xxh3_128: str = ""

    @classmethod
    def of(cls, path: Path) -> Known:
        """A file as it is, its hash left open."""
        status = path.stat()
        return cls(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino)


def verify(how: str) -> None:
    """``always`` reads every file once per process; ``cached`` trusts the hash of one that has not changed since."""
    _settings["cached"] = one_of(how, ("always", "cached"), "verify") == "cached"


def cached() -> bool:
    """Whether hashes that another process took may serve."""
    return _settings["cached"]


def held(path: str) -> Known | None:
    """What is remembered of a file."""
    return _lines().get(path)


def keep(known: Known) -> None:
    """Remembers a file; what cannot be written down is forgotten with the process."""
    if _lines().get(known.path) == known:
        return
    _lines()[known.path] = known
    with contextlib.suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(_file(), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:  # one call: lines of two processes do not mix
            os.write(descriptor, ("\n" + seal(json.dumps(asdict(known))) + "\n").encode())
        finally:
            os.close(descriptor)


def forget() -> None:
    """Reads the file again."""
    _lines.cache_clear()


@cache
def _lines() -> dict[str, Known]:
    found: dict[str, Known] = {}
    with contextlib.suppress(OSError):
        for line in _file().read_bytes().split(b"\n"):
            with contextlib.suppress(UserError, TypeError):  # cut short by a kill, or damaged: no longer known
                if line:
                    known = Known(**unsealed(line, ""))
                    found[known.path] = known
    return found


def folder() -> Path:
    """Where what outlives a process lies, all of it made again at need."""
    place = os.environ.get("FUSECHAT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fusechat"
    return Path(place).expanduser()


def _file() -> Path:
    return folder() / "checksums.jsonl"
