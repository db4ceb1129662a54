"""Files, directories and Hub ids -> a `datasets.Dataset` of whatever columns they have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from fusechat.app.checksums import check_first_use
from fusechat.app.errors import UserError

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
    if local.suffix in LOADERS or path.count("/") != 1:
        raise UserError(f"chat.path={path} does not exist; give a file, a directory or a Hub dataset id (owner/name)")
    try:
        return datasets.load_dataset(path, name, split=split, streaming=streaming)
    except Exception as error:
        raise UserError(
            f"chat.path={path} is neither a file here nor a dataset on the Hub that could be read: {error}"
        ) from error


def _load_files(path: Path, streaming: bool) -> Any:
    files = sorted(f for f in path.rglob("*") if f.suffix in LOADERS) if path.is_dir() else [path]
    if not files or files[0].suffix not in LOADERS:
        raise UserError(f"{path} is not a chat file; expected {', '.join(LOADERS)} or a directory of them")
    kind = LOADERS[files[0].suffix]
    for file in files:
        check_first_use(file)
    try:
        found = datasets.load_dataset(kind, data_files=[str(f) for f in files], split="train", streaming=streaming)
    except Exception as error:
        reason = _broken_line(files) or f"{path} cannot be read as {kind}: {error.__cause__ or error}"
        raise UserError(reason) from error
    for cached in [] if streaming else found.cache_files:
        check_first_use(Path(cached["filename"]), "remove it: it is made again from the chats")
    return found


def _taken(stream: Any, path: str) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_generator(lambda: iter(stream))
    except Exception as error:
        raise UserError(f"{path}: the stream broke off: {error.__cause__ or error}") from error


def _broken_line(files: Sequence[Path]) -> str | None:
    for file in files:
        if file.stat().st_size == 0:
            return f"{file} is empty; see chat.path"
        if file.suffix != ".jsonl":
            continue
        for number, line in enumerate(file.open(encoding="utf-8", errors="replace"), 1):
            try:
                json.loads(line)
            except json.JSONDecodeError as error:
                return f"{file}, line {number}: not JSON ({error.msg}); mend or remove the line"
    return None
