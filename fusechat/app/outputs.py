"""What a stage leaves behind: fingerprints, hashes, files and folders whole or absent, and whether to remake them.

A finished output says of itself what decided it: a store in ``manifest.json``, a model in ``fusechat.json``, a result
in its own file. `settled` is the one place where skip, refuse and overwrite are decided.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.locks import held
from fusechat.app.marks import FORMAT, Mark, difference, fingerprint, stage_fingerprint, stamp
from fusechat.app.sealed import seal, unsealed

__all__ = ["FORMAT", "Mark", "fingerprint", "stage_fingerprint", "stamp"]  # and what stands below

LOG = logging.getLogger(__name__)
RECORD, MANIFEST = "fusechat.json", "manifest.json"  # of a model, of a store


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settled(record: Path, mark: str, *, what: str, keep: str, overwrite: bool = False) -> dict[str, Any] | None:
    """What the output whose record this is says of itself where it fits ``mark``; None where it is to be made.

    what: the kind of output (target, merged model, …); keep: the key that gives another place, for the message. Raises
    `UserError` where other settings made it and ``overwrite`` is off.
    """
    found = read_json(record) if record.exists() and not overwrite else None
    if found is None:
        return None
    place = record.parent if record.name in (RECORD, MANIFEST) else record
    if found.get("fingerprint") != mark:
        raise UserError(
            f"{place} holds a {what} made with other settings ({difference(found, mark)}); "
            f"add overwrite=true to replace it, or {keep} to keep both"
        )
    LOG.info("skip: %s is there already (fingerprint %s)", place, mark)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that a stage has written. Raises `UserError` where it is damaged, cut short or something else."""
    remedy = "remove it and run the command that made it again"
    content = unsealed(path.read_bytes(), path, remedy)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; {remedy}")
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
    _sync(path.parent)


def write_json(path: Path, content: Any, *, sort_keys: bool = False) -> None:
    """Writes readable JSON durably, an object with its checksum; folders are made. sort_keys: equal contents are
    equal bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, sort_keys=sort_keys, default=str) + "\n"
    write_durably(path, (seal(text) if isinstance(content, dict) else text).encode())


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Writes lines durably: a kill loses nothing."""
    write_durably(path, "".join(line + "\n" for line in lines).encode())


def sealed_line(content: Mapping[str, Any]) -> str:
    """A JSON object with its checksum, as a line of a file that `whole_lines` reads."""
    return seal(json.dumps(content)) + "\n"


def whole_lines(path: Path) -> list[Any]:
    """The JSON lines that a killed run has left, those that end; one that was cut short is removed from the file.

    Raises `UserError` where one is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whole, _, cut = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    lines = whole.split(b"\n") if whole else []  # not splitlines: JSON strings may hold U+2028
    if cut:
        write_durably(path, b"".join(line + b"\n" for line in lines))
    remedy = "remove the file and run the same command again"
    return [unsealed(line, f"{path}, line {number}", remedy) for number, line in enumerate(lines, 1)]


@contextmanager
def whole_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears under its name only when the block has ended without an error; an old one stays till then.

    Raises `UserError` where there is one and ``overwrite`` is off, or where another process is writing it.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; add overwrite=true to replace it, or choose another output_dir")
    place = path.resolve()
    with held(place):
        tidy(place)
        temporary = _beside(place, "tmp")
        temporary.mkdir()
        try:
            yield temporary
            replace(place, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def replace(path: Path, new: Path) -> None:
    """Gives the folder ``new``, whole and on the disk, the name ``path``; what had it is deleted last."""
    for inner in new.rglob("*"):
        if inner.exists():  # a link may lead nowhere
            _sync(inner)
    _sync(new)
    aside = _beside(path, "old")
    if path.exists():
        path.rename(aside)
    new.rename(path)
    _sync(path.parent)
    _remove(aside)


def tidy(path: Path) -> None:
    """Makes good what a killed process has left of an output: what was set aside comes back, temporary names go.

    Only for who holds the output (`locks.held`).
    """
    aside = _beside(path, "old")
    if aside.exists() and not path.exists():
        aside.rename(path)
    for left in (aside, _beside(path, "tmp")):
        _remove(left)
    # the files beside a result have its stem, those of a store lie inside; a folder `.a_0.5.tmp` is another target's
    stem = re.escape(path.stem)
    for folder, name in ((path.parent, rf"\.{stem}(\.[^.]+)?\.\d+\.tmp"), (path, r"\..+\.\d+\.tmp")):
        if folder.is_dir():
            for file in (file for file in folder.glob(".*.tmp") if re.fullmatch(name, file.name) and file.is_file()):
                _remove(file)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """fsync of a file or folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
