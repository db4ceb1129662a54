"""Files, directories and Hub ids -> a `datasets.Dataset` of whatever columns they have."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from fusechat.app import disk
from fusechat.app.checksums import check_first_use
from fusechat.app.errors import UserError
from fusechat.app.schema.values import is_hub_id
from fusechat.app.texts import json_rows

logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what they log is told as a UserError
STATE = "state.json"  # of a dataset on disk
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}


def read_rows(path: str, *, split: str, name: str | None, limit: int | None, streaming: bool) -> datasets.Dataset:
    """The first ``limit`` rows (None: all). Raises `UserError` for what cannot be read, a broken line by its number."""
    raw = _load(path, split, name, streaming)
    if streaming:
        return _taken(raw.take(limit) if limit else raw, path)
    return raw.select(range(min(limit, len(raw)))) if limit else raw


def _load(path: str, split: str, name: str | None, streaming: bool) -> Any:
    local = Path(path)
    if local.exists():
        dataset_dict = (local / split / STATE).exists()
        return _load_files(local / split if dataset_dict else local, streaming)
    if local.suffix in LOADERS or not is_hub_id(path) or local.parent.exists():
        raise UserError(f"chat.path={path} does not exist; give a file, a directory or a Hub dataset id (owner/name)")
    try:
        return datasets.load_dataset(path, name, split=split, streaming=streaming)
    except Exception as error:
        raise UserError(
            f"chat.path={path} is neither a file here nor a dataset on the Hub that could be read: {error}"
        ) from error


def _load_files(path: Path, streaming: bool) -> Any:
    files = _files(path)
    if not files or files[0].suffix not in LOADERS:
        raise UserError(f"{path} is not a chat file; expected {', '.join(LOADERS)} or a directory of them")
    kinds = {LOADERS[file.suffix]: file for file in files}
    if len(kinds) > 1:
        several = " and ".join(file.name for file in kinds.values())
        raise UserError(
            f"{path} holds files of several kinds ({several}); give one of them, or a directory of one kind"
        )
    (kind,) = kinds
    for file in files:
        check_first_use(file)
    if kind == "json" and any(_is_list(file) for file in files):
        check_texts(path)  # half a character in a list is dropped by the loader without a word
    names = [glob.escape(str(file)) for file in files]
    try:
        found = datasets.load_dataset(kind, data_files=names, split="train", streaming=streaming)
    except Exception as error:
        check_texts(path)
        _check_cache(error, files)
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        hint = "do all rows have the same columns and types?"
        raise UserError(f"{path} cannot be read as {kind} ({reason}); {hint}") from error
    for cached in [] if streaming else found.cache_files:
        check_first_use(Path(cached["filename"]), "remove it: it is made again from the chats")
    return found


def _check_cache(error: Exception, files: Sequence[Path]) -> None:
    """Raises `UserError`, or the error again where a disk is full, for one that is not about the chats' own files."""
    number, place = disk.cause(error)
    if number in disk.REMEDIES:
        raise error
    if place and Path(place) not in files:
        raise UserError(
            f"{place} cannot be written ({os.strerror(number)}), where Hugging Face keeps what it has read of chats; "
            "HF_HOME=DIR names another folder"
        ) from error


def _taken(stream: Any, path: str) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_generator(lambda: iter(stream))
    except Exception as error:
        raise UserError(f"{path}: the stream broke off: {error.__cause__ or error}") from error


def check_texts(path: Path) -> None:
    """Raises `UserError` for a file without content, and for the first line that is no UTF-8, no JSON or no object."""
    for file in _files(path):
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty; see chat.path")
        if LOADERS[file.suffix] == "json":
            rows, _ = json_rows(file)
            if not rows:
                raise UserError(f"{file} holds no chats; see chat.path")
            for number, row in enumerate(rows):
                if not isinstance(row, dict):
                    raise UserError(
                        f"{file}, chat {number}: expected an object {{..}}, found {row!r:.60}; see chat.path"
                    )


def _is_list(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _files(path: Path) -> list[Path]:
    """The file, or those below a directory; hidden ones are other programs'."""
    if not path.is_dir():
        return [path]
    if (path / STATE).exists():
        return _saved(path)
    inside = [(file, file.relative_to(path).parts) for file in path.rglob("*") if file.suffix in LOADERS]
    files = sorted(file for file, parts in inside if not file.is_dir() and not any(part[0] == "." for part in parts))
    if absent := [file for file in files if not file.exists()]:
        raise UserError(f"{absent[0]} is a link to nothing; mend or remove it")
    return files


def _saved(path: Path) -> list[Path]:
    """The files of `datasets.Dataset.save_to_disk`, which itself would write what is made of them beside them."""
    try:
        files = [path / file["filename"] for file in json.loads((path / STATE).read_bytes())["_data_files"]]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path / STATE} is not what datasets writes ({error}); save the dataset again") from error
    if absent := [file for file in files if not file.exists()]:
        raise UserError(f"{absent[0]} is missing; save the dataset again")
    return files
