"""Chats in the formats people have -> one `datasets.Dataset` of id, messages, tag. Rows keep the files' order.

A format is a function of a row that returns its messages: turns of role and content. Needs: its columns.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from fusechat.app.errors import UserError
from fusechat.app.registry import Family
from fusechat.chats.files import check_texts, read_rows
from fusechat.chats.mixture import PART, Given, Several, mixed, parts_of
from fusechat.chats.roles import CALLS, ROLES, Message, called, calls_of, introduced, tools_of

Row = Mapping[str, Any]
LOG = logging.getLogger(__name__)
FORMATS = Family("chat.format", needs=None)
COLUMNS = {"id", "messages", "tag"}  # of what `load_chats` returns
NOT_RENDERED = "reasoning_content"  # of a turn, beside its content


@FORMATS.register("messages", "messages: a list of role and content", needs=("messages",))
def messages(row: Row) -> list[Message]:
    """As chat APIs and most of the Hub have it; calls of tools become text (`roles`)."""
    turns = _turns(row, "messages")
    if any(turn.get(NOT_RENDERED) for turn in turns):
        raise ValueError(f"{NOT_RENDERED} would be lost (only texts are rendered); write it into content, or leave it")
    return introduced([_said(turn) for turn in turns], tools_of(row.get("tools")))


@FORMATS.register("sharegpt", "conversations: a list of from (human, gpt) and value", needs=("conversations",))
def sharegpt(row: Row) -> list[Message]:
    """As ShareGPT and FuseChat-Mixture have it, and LLaMA-Factory with system and tools beside the turns."""
    turns = [{"role": turn["from"], "content": turn["value"]} for turn in _turns(row, "conversations")]
    spoken = [{**turn, "content": called(turn["content"])} if turn["role"] == CALLS else turn for turn in turns]
    system = "\n\n".join(filter(None, (_text(row.get("system")), tools_of(row.get("tools")))))
    return introduced(spoken, system)


@FORMATS.register("alpaca", "instruction, input where there is one, output", needs=("instruction", "output"))
def alpaca(row: Row) -> list[Message]:
    """The input follows the instruction after an empty line."""
    question = "\n\n".join(part for part in map(_text, (row["instruction"], row.get("input"))) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


@FORMATS.register("prompt_response", "prompt and response", needs=("prompt", "response"))
def prompt_response(row: Row) -> list[Message]:
    """One question, one answer."""
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]


@FORMATS.register("text", "text alone, all of it the assistant's", needs=("text",))
def text(row: Row) -> list[Message]:
    """Plain text, as FuseLLM reads it (with chat.template=plain)."""
    return [{"role": "assistant", "content": row["text"]}]


def _said(turn: Row) -> Message:
    """A turn with its calls of tools behind its text."""
    if calls := calls_of(turn):
        return {"role": turn["role"], "content": "\n".join([*filter(None, [_text(turn.get("content"))]), *calls])}
    return {"role": turn["role"], "content": turn["content"]}


def _turns(row: Row, column: str) -> list[Row]:
    turns = row[column]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise TypeError(f"{column} is {turns!r:.60}, no list of objects")
    return turns


def chat_id(messages: Sequence[Message]) -> str:
    """16 hexadecimal digits of the content's hash: what identifies a chat everywhere."""
    return hashlib.sha256(json.dumps(messages, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def in_validation(identity: str, fraction: float, seed: int) -> bool:
    """Whether a chat belongs to the validation part: decided by its content and the seed, not by its place."""
    digest = hashlib.sha256(f"{seed}:{identity}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def load_chats(
    path: Given | datasets.Dataset,
    *,
    format: str | None = None,
    split: str = "train",
    name: str | None = None,
    limit: int | None = None,
    streaming: bool = False,
    tag: str = "tag",
    seed: int = 0,
) -> tuple[datasets.Dataset, str]:
    """Chats from a file, a directory, a Hub dataset id or a dataset; a list of them is a mixture, which ``seed`` draws
    (`mixture.mixed`) and of which limit takes the first. Returns them and the name of their format.

    format: one of `FORMATS`; None finds it by the columns. tag: a column (skill, origin) by which reports break results
    down. Raises `UserError` for anything that is not a chat dataset: a broken line (with its number), unknown columns,
    an unknown role, no chats at all.
    """
    if isinstance(path, Sequence) and not isinstance(path, str):
        return _mixture(path, seed, limit, {"format": format, "split": split, "name": name}, streaming, tag)
    if isinstance(path, datasets.Dataset):
        where, raw = "the dataset", path
        if set(raw.column_names) - {PART} == COLUMNS:
            return raw, "messages"  # what this function has returned
    else:
        where = str(path)
        raw = read_rows(where, split=split, name=name, limit=limit, streaming=streaming)
    if not len(raw):
        raise UserError(f"{where} holds no chats; see chat.path")
    found = _format_of(set(raw.column_names), format, where)
    convert = FORMATS[found].function

    silent = []  # chats in which the assistant has no text

    def normal(row: Row, index: int) -> dict[str, Any]:
        turns = _checked(convert, row, f"{where}, chat {index}")
        if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
            silent.append(index)
        return {"id": chat_id(turns), "messages": turns, "tag": str(row.get(tag) or "")}

    try:
        rows = raw.map(normal, with_indices=True, remove_columns=raw.column_names, load_from_cache_file=False)
    except (UserError, UnicodeDecodeError) as error:
        if Path(where).exists():
            check_texts(Path(where))  # the file's own fault, with its line
        raise error if isinstance(error, UserError) else UserError(f"{where}: not UTF-8 ({error})") from error
    if len(silent) == len(rows):
        raise UserError(f"{where}: the assistant has no text in any of {len(rows)} chats; see chat.format")
    if silent:
        LOG.warning("%s: the assistant has no text in %d of %d chats", where, len(silent), len(rows))
    return rows, found


def _mixture(
    given: Several, seed: int, limit: int | None, shared: Mapping[str, str | None], streaming: bool, tag: str
) -> tuple[datasets.Dataset, str]:
    """The parts, each loaded by what all share and it says itself; and their formats."""
    parts = parts_of(given)
    options = [{**shared, **part.options} for part in parts]
    loaded: list[tuple[datasets.Dataset, str]] = [
        load_chats(part.path, **own, streaming=streaming, tag=tag)  # type: ignore[arg-type]
        for part, own in zip(parts, options, strict=True)
    ]
    whole = mixed(parts, [rows for rows, _ in loaded], seed)
    return whole.select(range(min(limit or len(whole), len(whole)))), ", ".join(
        dict.fromkeys(kind for _, kind in loaded)
    )


def _format_of(columns: set[str], format: str | None, where: str) -> str:
    """The format asked for, or the first whose columns are there."""
    if format is not None:
        if missing := FORMATS[format].needs - columns:
            raise UserError(
                f"{where} has the columns {', '.join(sorted(columns))}; chat.format={format} needs "
                f"{', '.join(sorted(missing))} too; chat.format=null finds the format by its columns"
            )
        return format
    found = next((name for name, member in FORMATS.items() if member.needs and member.needs <= columns), None)
    if found is None:
        expected = "; ".join(f"{name}: {', '.join(sorted(member.needs))}" for name, member in FORMATS.items())
        raise UserError(f"{where} has the columns {', '.join(sorted(columns))}; expected one of {expected}")
    return found


def _checked(convert: Callable[[Row], list[Message]], row: Row, where: str) -> list[Message]:
    """The row's messages with our names for roles. Raises `UserError` that tells where and why there are none."""
    try:
        turns = [{"role": ROLES[turn["role"]], "content": _text(turn["content"])} for turn in convert(row)]
    except KeyError as error:
        raise UserError(f"{where}: unknown role or key {error}; roles are {', '.join(ROLES)}") from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"{where}: a turn is not a role with a text ({error})") from error
    except UnicodeDecodeError:
        raise  # told with its line
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if not turns:
        raise UserError(f"{where}: no messages")
    return turns


def _text(content: Any) -> str:
    """A message's text; a list of text parts, as chat APIs have it, is joined."""
    match content:
        case None:
            return ""
        case str():
            return content
        case [*parts] if all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in parts
        ):
            return "".join(part["text"] for part in parts)
    raise TypeError(
        "its content is " + ("a list of more than text" if isinstance(content, list) else f"{content!r:.60}")
    )
