"""Checksums of all that stages write, compared where it is read: once per file and process, before it is relied on.

JSON objects of ours carry their own (`sealed`); every other file's stands in the record of the folder that it belongs
to (``files`` of ``fusechat.json``, ``shards`` and ``files`` of ``manifest.json``). What others made has none: its hash
is remembered when it is first used (`remembered`).
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from fusechat.app import remembered
from fusechat.app.errors import UserError
from fusechat.app.remembered import Known
from fusechat.app.sealed import AGAIN, ALGORITHM, compare

WINDOW = 64 << 20  # bytes mapped at a time
FIRST_USE = "it changed since its first use without being written: copy or download it again"
Entry = Mapping[str, Any]  # bytes and xxh3_128 of a file; sha256 where an older version wrote it
_accepting = [False]
_found: dict[tuple[Known, str], str] = {}  # what this process has hashed


def accept_changes(on: bool) -> None:
    """Whether models of ours that were changed by hand are taken as they are, from now on."""
    _accepting[0] = on


def accepting() -> bool:
    """What `accept_changes` was told last."""
    return _accepting[0]


def digest(path: Path, algorithm: str = ALGORITHM) -> str:
    """A file's hash, in hexadecimal digits. A file is read once, unless it is written anew."""
    now = Known.of(path)
    key = (now, algorithm)
    if key not in _found:
        before = remembered.held(now.path) if remembered.cached() and algorithm == ALGORITHM else None
        if before is not None and replace(before, xxh3_128="") == now:
            _found[key] = before.xxh3_128
        else:
            _found[key] = _read(path, algorithm)
            if remembered.cached() and algorithm == ALGORITHM:
                remembered.keep(replace(now, xxh3_128=_found[key]))
    return _found[key]


def entry(path: Path, found: str | None = None) -> dict[str, Any]:
    """What a record says of a file. found: its xxh3_128, where that was taken while it was written."""
    return {"bytes": path.stat().st_size, ALGORITHM: found or digest(path)}


def check(path: Path, expected: Entry, remedy: str = AGAIN) -> None:
    """Raises `UserError` where a file is missing or not what its record says; remedy: what makes it anew."""
    check_size(path, expected, remedy)
    algorithm = ALGORITHM if ALGORITHM in expected else "sha256"
    compare(path, digest(path, algorithm), expected[algorithm], remedy, algorithm)


def check_size(path: Path, expected: Entry, remedy: str = AGAIN) -> None:
    """Raises `UserError` where a file is missing, or longer or shorter than its record says."""
    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    if (size := path.stat().st_size) != expected.get("bytes", size):
        raise UserError(f"{path} is damaged ({expected['bytes']} bytes expected, {size} found); {remedy}")


def check_first_use(path: Path, remedy: str = FIRST_USE, *, found: str | None = None) -> None:
    """Compares a file that carries no checksum with what it was when it was first used, if nobody wrote it since.

    found: its hash, where that is known. Raises `UserError` where the content changed, size and time did not.
    """
    now = Known.of(path)
    before = remembered.held(now.path)
    found = found or digest(path)
    if before is not None and (before.bytes, before.mtime_ns) == (now.bytes, now.mtime_ns):
        compare(path, found, before.xxh3_128, remedy)
    else:
        remembered.keep(replace(now, xxh3_128=found))


class Stream:
    """A file's hash, taken as its parts are used, so that they are read once; what was left out is read at the end.

    head: the beginning of the file, known already; judge: told the file and its hash, raises where that is wrong.
    """

    def __init__(self, path: Path, head: bytes, judge: Callable[[Path, str], None]) -> None:
        self.path, self.at, self.judge = path, len(head), judge
        self._hash, self._done = xxhash.xxh3_128(head), False

    def feed(self, start: int, data: Any) -> None:
        """The bytes from ``start`` on; they count where they go on from what was seen."""
        if start <= self.at < start + len(data):
            self._hash.update(data[self.at - start :])
            self.at = start + len(data)

    def finish(self) -> None:
        """Reads the rest and compares, once. Raises `UserError` where the file is damaged."""
        if not self._done:
            _windows(self.path, self.at, self._hash.update)
            self.judge(self.path, self._hash.hexdigest())
        self._done = True


def forget() -> None:
    """As if this process had opened nothing yet."""
    _found.clear()
    remembered.forget()


def _read(path: Path, algorithm: str) -> str:
    hasher: Any = xxhash.xxh3_128() if algorithm == ALGORITHM else hashlib.new(algorithm)
    _windows(path, 0, hasher.update)
    return str(hasher.hexdigest())


def _windows(path: Path, start: int, use: Callable[[Any], Any]) -> None:
    """Gives a file's content from ``start`` on, mapped piece by piece: nothing is copied, pages are let go."""
    with path.open("rb", buffering=0) as file:
        size = path.stat().st_size
        for first in range(start - start % mmap.ALLOCATIONGRANULARITY, size, WINDOW):
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            length = min(WINDOW, size - first)
            with mmap.mmap(file.fileno(), length, flags=flags, prot=mmap.PROT_READ, offset=first) as pages:
                use(memoryview(pages)[max(0, start - first) :])
