"""What leaves a side, and nothing else: the whitelist of messages, written and read as files.

A message is a folder: an envelope (`Envelope`), and beside it what a side's model says of the public chats
(`KNOWLEDGE`), its adapters (`TENSORS`), or both. The texts themselves, token ids of chats, and whatever else a store of
distributions holds, are not among them: who knows the public chats and the sender's tokenizer makes them again
(`fusechat.mutual.hearing`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fusechat.app import checksums
from fusechat.app.errors import UserError
from fusechat.app.outputs import read_json, whole_directory, write_json
from fusechat.stores.encoding import decode_logprobs, encode_counts
from fusechat.stores.writer import list_column

if TYPE_CHECKING:
    from torch import Tensor

    from fusechat.stores.store import DistributionStore

ENVELOPE, KNOWN, ADAPTER = "envelope.json", "knowledge.arrow", "adapter_model.safetensors"
FILES = (ENVELOPE, KNOWN, ADAPTER)
KNOWLEDGE = pa.schema(
    {
        "row": pa.int32(),  # of the public chats
        "counts": pa.list_(pa.uint16()),  # entries at each position; one number where all have as many
        "ids": pa.list_(pa.uint32()),  # the likeliest next tokens, of the sender's vocabulary
        "logprobs": pa.list_(pa.float16()),  # of these
        "gold_logprob": pa.list_(pa.float32()),  # of the next token of the text; their sum is the cross entropy
    }
)
TENSORS = re.compile(r"base_model\.model\..+\.lora_(embedding_)?[AB](\.weight)?")  # names of low-rank factors
AGAIN = "it is not read"


@dataclass(frozen=True)
class Envelope:
    """sender: its name; round: from 1 on. chats: fingerprint of the public chats; tokenizer: identity of the sender's.

    trained_on: how many private chats an adapter is of, its weight in a mean. files: name -> bytes and checksum.
    """

    sender: str
    round: int
    chats: str
    tokenizer: str
    trained_on: int
    files: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Message:
    """A message that was read and found whole. knowledge: rows of `KNOWLEDGE`; adapter: tensors by peft's names."""

    envelope: Envelope
    place: Path
    knowledge: pa.Table | None
    adapter: Mapping[str, Tensor] | None


def post(
    place: Path,
    *,
    sender: str,
    round: int,
    store: DistributionStore | None = None,
    adapter: Path | None = None,
    chats: str = "",
    tokenizer: str = "",
    trained_on: int = 0,
) -> None:
    """Writes a message, whole or not at all. store: of the public chats; adapter: a folder with one.

    Raises `UserError` where an adapter holds more than low-rank factors.
    """
    with whole_directory(place, overwrite=True) as directory:
        if store is not None:
            _write(knowledge_of(store), directory / KNOWN)
            chats, tokenizer = store.manifest["chats"], store.manifest["tokenizer"]
        if adapter is not None:
            _write_adapter(adapter / ADAPTER, directory / ADAPTER)
        files = {file.name: checksums.entry(file) for file in sorted(directory.iterdir())}
        write_json(directory / ENVELOPE, asdict(Envelope(sender, round, chats, tokenizer, trained_on, files)))


def read(place: Path, sender: str, round: int) -> Message:
    """A message, after a look at all of it.

    Raises `UserError` for what is missing, damaged, not finite, of another sender or round, or not on the whitelist.
    """
    envelope = _envelope(place, sender, round)
    found = {file.name for file in place.iterdir()} - {ENVELOPE}
    if more := sorted(found ^ envelope.files.keys() | found - {KNOWN, ADAPTER}):
        raise UserError(f"the message {place} holds or lacks {', '.join(more)}; {AGAIN}")
    for name, expected in envelope.files.items():
        checksums.check(place / name, expected, AGAIN)
    knowledge = _read_knowledge(place / KNOWN) if KNOWN in found else None
    adapter = _read_adapter(place / ADAPTER) if ADAPTER in found else None
    return Message(envelope, place, knowledge, adapter)


def packed(place: Path) -> dict[str, bytes]:
    """A message as it travels: the content of its files by their names; empty where there is none."""
    return {name: (place / name).read_bytes() for name in FILES if (place / name).is_file()}


def unpacked(files: Mapping[str, bytes], place: Path) -> None:
    """Writes a message that has come, whole or not at all. Raises `UserError` for names that no message has."""
    if more := sorted(files.keys() - set(FILES)):
        raise UserError(f"a message holds {more[0]!r}; {AGAIN}")
    with whole_directory(place, overwrite=True) as directory:
        for name, content in files.items():
            (directory / name).write_bytes(content)


def bytes_of(place: Path) -> int:
    """What a message weighs; 0 where there is none."""
    return sum(file.stat().st_size for file in place.glob("*")) if place.is_dir() else 0


def knowledge_of(store: DistributionStore) -> pa.Table:
    """The rows of `KNOWLEDGE` in a store; chats of which the model says nothing are left out."""
    rows: dict[str, list[Any]] = {name: [] for name in KNOWLEDGE.names}
    for row in np.flatnonzero(store.column("tokens") > 0).tolist():
        counts, ids, logprobs, gold = store.row(row, "counts", "ids", "logprobs", "gold_logprob")
        parts = {"row": row, "counts": encode_counts(counts), "ids": ids, "gold_logprob": gold}
        for name, value in {**parts, "logprobs": decode_logprobs(logprobs)}.items():
            rows[name].append(value)
    columns = {"row": pa.array(rows.pop("row"), pa.int32())}
    for name, values in rows.items():
        columns[name] = list_column(values, KNOWLEDGE.field(name).type.value_type.to_pandas_dtype())
    return pa.table(columns, schema=KNOWLEDGE)


def _envelope(place: Path, sender: str, round: int) -> Envelope:
    if not (place / ENVELOPE).is_file():
        raise UserError(f"there is no message in {place}")
    content = read_json(place / ENVELOPE)
    if content.keys() != {field.name for field in fields(Envelope)}:
        raise UserError(f"{place / ENVELOPE} has other keys than an envelope ({', '.join(content)}); {AGAIN}")
    envelope = Envelope(**content)
    if envelope.sender != sender:
        raise UserError(f"{place} is a message of {envelope.sender}, not of {sender}; {AGAIN}")
    if envelope.round != round:
        raise UserError(f"{place} is a message of round {envelope.round}, not of {round}; {AGAIN}")
    return envelope


def _write(table: pa.Table, file: Path) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _read_knowledge(file: Path) -> pa.Table:
    try:
        with pa.OSFile(str(file)) as source:
            table = pa.ipc.open_stream(source).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} is no Arrow stream ({error}); {AGAIN}") from error
    if not table.schema.equals(KNOWLEDGE, check_metadata=True):
        raise UserError(f"{file} has the columns {', '.join(table.schema.names)}, not those of a message; {AGAIN}")
    for name in ("logprobs", "gold_logprob"):
        values = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        if not np.isfinite(values).all():
            raise UserError(f"{file} has NaN or inf in {name}; {AGAIN}")
    return table


def _write_adapter(source: Path, file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(source)
    if more := [name for name in tensors if not TENSORS.fullmatch(name)]:
        raise UserError(
            f"{source} trains {more[0]} whole: only low-rank factors leave a side; see lora.modules_to_save"
        )
    save_file(tensors, file)


def _read_adapter(file: Path) -> Mapping[str, Tensor]:
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(file, "pt") as opened:
            told, tensors = opened.metadata(), load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is no safetensors file ({error}); {AGAIN}") from error
    if told or (more := [name for name in tensors if not TENSORS.fullmatch(name)]):
        raise UserError(f"{file} holds {'metadata' if told else more[0]}, which is no part of an adapter; {AGAIN}")
    if bad := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise UserError(f"{file} has NaN or inf in {bad[0]}; {AGAIN}")
    return tensors
