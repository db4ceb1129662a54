"""Chat files in the formats people have -> one `datasets.Dataset` of id, messages, tag. Rows keep the files' order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from fusechat.app.errors import UserError
from fusechat.chats.render import Message

Row = Mapping[str, Any]
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"} | {
    role: role for role in ("system", "user", "assistant", "tool", "developer")
}
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}


def _turns(row: Row, column: str, role_key: str, text_key: str) -> list[Message]:
    return [{"role": turn[role_key], "content": turn[text_key]} for turn in row[column]]


def _alpaca(row: Row) -> list[Message]:
    question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _pair(row: Row) -> list[Message]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]


FORMATS: dict[str, tuple[frozenset[str], Callable[[Row], list[Message]]]] = {
    "messages": (frozenset({"messages"}), lambda row: _turns(row, "messages", "role", "content")),
    "sharegpt": (frozenset({"conversations"}), lambda row: _turns(row, "conversations", "from", "value")),
    "alpaca": (frozenset({"instruction", "output"}), _alpaca),
    "prompt/response": (frozenset({"prompt", "response"}), _pair),
    "text": (frozenset({"text"}), lambda row: [{"role": "assistant", "content": row["text"]}]),
}


def chat_id(messages: Sequence[Message]) -> str:
    """16 hexadecimal digits of the content's hash: what identifies a chat everywhere."""
    return hashlib.sha256(json.dumps(messages, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def in_validation(identity: str, fraction: float, seed: int) -> bool:
    """Whether a chat belongs to the validation part: decided by its content and the seed, not by its place."""
    digest = hashlib.sha256(f"{seed}:{identity}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def load_chats(
    path: str,
    *,
    split: str = "train",
    name: str | None = None,
    limit: int | None = None,
    streaming: bool = False,
    tag: str = "tag",
) -> tuple[datasets.Dataset, str]:
    """Chats from a file, a directory or a Hub dataset id. Returns them and the name of the format found.

    ``tag`` names a column (skill, origin) that reports break results down by. Raises `UserError` for anything that
    is not a chat dataset: a broken line (with its number), unknown columns, an unknown role, no chats at all.
    """
    raw = _load(path, split, name, streaming)
    if streaming:
        raw = _taken(raw.take(limit) if limit else raw, path)
    elif limit:
        raw = raw.select(range(min(limit, len(raw))))
    if not len(raw):
        raise UserError(f"{path} holds no chats; see chat.path")
    columns = set(raw.column_names)
    found = next((key for key, (needed, _) in FORMATS.items() if needed <= columns), None)
    if found is None:
        expected = "; ".join(f"{key}: {', '.join(sorted(needed))}" for key, (needed, _) in FORMATS.items())
        raise UserError(f"{path} has the columns {', '.join(sorted(columns))}; expected one of {expected}")
    convert = FORMATS[found][1]

    def normal(row: Row, index: int) -> dict[str, Any]:
        messages = _checked(convert, row, index, path)
        return {"id": chat_id(messages), "messages": messages, "tag": str(row.get(tag) or "")}

    return raw.map(normal, with_indices=True, remove_columns=raw.column_names, load_from_cache_file=False), found


def _taken(stream: Any, path: str) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_generator(lambda: iter(stream))
    except Exception as error:
        raise UserError(f"{path}: the stream broke off: {error.__cause__ or error}") from error


def _checked(convert: Callable[[Row], list[Message]], row: Row, index: int, path: str) -> list[Message]:
    try:
        messages = [{"role": ROLES[m["role"]], "content": _text(m["content"])} for m in convert(row)]
    except KeyError as error:
        raise UserError(f"{path}, chat {index}: unknown role or key {error}; roles are {', '.join(ROLES)}") from error
    except TypeError as error:
        raise UserError(f"{path}, chat {index}: a turn is not a role with a text ({error})") from error
    if not messages:
        raise UserError(f"{path}, chat {index}: no messages")
    if any(turn.get("tool_calls") for turn in row.get("messages") or []):
        raise UserError(
            f"{path}, chat {index}: tool_calls would be lost (only texts are rendered); write them into content, or leave it out"
        )
    return messages


def _text(content: Any) -> str:
    """A message's text; a list of text parts, as chat APIs have it, is joined."""
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        return "".join(part["text"] for part in content)
    if content is None or isinstance(content, str):
        return content or ""
    raise TypeError(f"content is {type(content).__name__} with more than text")


def _load(path: str, split: str, name: str | None, streaming: bool) -> Any:
    local = Path(path)
    if (local / "state.json").exists():
        return datasets.load_from_disk(path)
    files = sorted(f for f in local.rglob("*") if f.suffix in LOADERS) if local.is_dir() else [local]
    if local.exists():
        if not files or files[0].suffix not in LOADERS:
            raise UserError(f"{path} is not a chat file; expected {', '.join(LOADERS)} or a directory of them")
        kind = LOADERS[files[0].suffix]
        try:
            return datasets.load_dataset(kind, data_files=[str(f) for f in files], split="train", streaming=streaming)
        except Exception as error:
            raise UserError(
                _broken_line(files) or f"{path} cannot be read as {kind}: {error.__cause__ or error}"
            ) from error
    if local.suffix in LOADERS or path.count("/") != 1:
        raise UserError(f"chat.path={path} does not exist; give a file, a directory or a Hub dataset id (owner/name)")
    try:
        return datasets.load_dataset(path, name, split=split, streaming=streaming)
    except Exception as error:
        raise UserError(
            f"chat.path={path} is neither a file here nor a dataset on the Hub that could be read: {error}"
        ) from error


def _broken_line(files: Sequence[Path]) -> str | None:
    for file in files:
        if file.stat().st_size == 0:
            return f"{file} is empty; see chat.path"
        if file.suffix == ".jsonl":
            for number, line in enumerate(file.open(encoding="utf-8", errors="replace"), 1):
                try:
                    json.loads(line)
                except json.JSONDecodeError as error:
                    return f"{file}, line {number}: not JSON ({error.msg}); mend or remove the line"
    return None
