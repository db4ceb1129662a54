"""What a stage leaves behind: fingerprints, hashes, files and folders whole or absent, and whether to remake them.

A finished output says of itself what decided it: a store in ``manifest.json``, a model in ``fusechat.json``, a result
in its own file. `settled` is the one place where skip, refuse and overwrite are decided.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError

LOG = logging.getLogger(__name__)
FORMAT = 2  # of everything that is stored; part of every fingerprint
RECORD = "fusechat.json"


def fingerprint(**parts: Any) -> str:
    """A short hash of everything that decides a stage's output; equal inputs give equal fingerprints."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True)  # no default: an object's repr may hide what differs
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stage_fingerprint(imports: Mapping[str, str] | None = None, **parts: Any) -> str:
    """`fingerprint` of a stage. imports: the user's own modules with their hashes, where the stage ran with any."""
    return fingerprint(**parts, **({"imports": dict(imports)} if imports else {}))


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settled(record: Path, mark: str, *, what: str, keep: str, overwrite: bool = False) -> dict[str, Any] | None:
    """What the output whose record this is says of itself where it fits ``mark``; None where it is to be made.

    what: the kind of output (target, merged model, …); keep: the key that gives another place, for the message. Raises
    `UserError` where other settings made it and ``overwrite`` is off.
    """
    held = read_json(record) if record.exists() and not overwrite else None
    if held is None:
        return None
    place = record.parent if record.name in (RECORD, "manifest.json") else record
    if held.get("fingerprint") != mark:
        raise UserError(
            f"{place} holds a {what} made with other settings (fingerprint {held.get('fingerprint')}, now {mark}); "
            f"add overwrite=true to replace it, or {keep} to keep both"
        )
    LOG.info("skip: %s is there already (fingerprint %s)", place, mark)
    return held


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that a stage has written. Raises `UserError` where it is cut short or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is half-written or not JSON; remove it and run the command that made it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; remove it and run the command that made it again")
    return content


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file so that it is either whole or absent: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_json(path: Path, content: Any, *, sort_keys: bool = False) -> None:
    """Writes readable JSON durably; folders are made. sort_keys: equal contents are equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, (json.dumps(content, indent=1, sort_keys=sort_keys, default=str) + "\n").encode())


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Writes lines durably: a kill loses nothing."""
    write_durably(path, "".join(line + "\n" for line in lines).encode())


def whole_lines(path: Path) -> list[Any]:
    """The JSON lines that a killed run has left, those that end; one that was cut short is removed from the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole, _, cut = path.read_text(encoding="utf-8").rpartition("\n") if path.exists() else ("", "", "")
    lines = whole.split("\n") if whole else []  # not splitlines: JSON strings may hold U+2028
    if cut:
        write_lines(path, lines)
    return [json.loads(line) for line in lines]


@contextmanager
def whole_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears under its name only when the block has ended without an error."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; add overwrite=true to replace it, or choose another output_dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = path.with_name(
        f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp"
    )  # another job may write the same name
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Removes what killed runs on this host have left of ``path``."""
    for left in path.parent.glob(f".{path.name}.{socket.gethostname()}-*.tmp"):
        if not _alive(int(left.name.split("-")[-1].removesuffix(".tmp"))):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()  # our own has ended with an error before, or the number was another's


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
