"""Files, directories and Hub ids -> a `datasets.Dataset` of whatever columns they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from fusechat.app.checksums import check_first_use
from fusechat.app.errors import UserError
from fusechat.app.schema.values import is_hub_id
from fusechat.app.texts import json_rows

LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}


def read_rows(path: str, *, split: str, name: str | None, limit: int | None, streaming: bool) -> datasets.Dataset:
    """The first ``limit`` rows (None: all). Raises `UserError` for what cannot be read, a broken line by its number."""
    raw = _load(path, split, name, streaming)
    if streaming:
        return _taken(raw.take(limit) if limit else raw, path)
    return raw.select(range(min(limit, len(raw)))) if limit else raw


def _load(path: str, split: str, name: str | None, streaming: bool) -> Any:
    local = Path(path)
    if (local / "state.json").exists():
        return datasets.load_from_disk(path)
    if local.exists():
        return _load_files(local, streaming)
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
    kind = LOADERS[files[0].suffix]
    for file in files:
        check_first_use(file)
    try:
        found = datasets.load_dataset(kind, data_files=[str(f) for f in files], split="train", streaming=streaming)
    except Exception as error:
        check_texts(path)
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        hint = "do all rows have the same columns and types?"
        raise UserError(f"{path} cannot be read as {kind} ({reason}); {hint}") from error
    for cached in [] if streaming else found.cache_files:
        check_first_use(Path(cached["filename"]), "remove it: it is made again from the chats")
    return found


def _taken(stream: Any, path: str) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_generator(lambda: iter(stream))
    except Exception as error:
        raise UserError(f"{path}: the stream broke off: {error.__cause__ or error}") from error


def check_texts(path: Path) -> None:
    """Raises `UserError` for a file without content, and for the first line that is no UTF-8 or no JSON."""
    for file in _files(path):
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty; see chat.path")
        if LOADERS[file.suffix] == "json":
            json_rows(file)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.suffix in LOADERS) if path.is_dir() else [path]
