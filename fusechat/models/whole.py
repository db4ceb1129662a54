"""Whether a model's directory is what it was when it was made; one from elsewhere, when it was first used."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fusechat.app import checksums
from fusechat.app.errors import UserError
from fusechat.app.outputs import RECORD, read_json, write_json
from fusechat.app.sealed import ALGORITHM, compare
from fusechat.app.texts import json_object
from fusechat.app.verbs import command_line
from fusechat.models import changes

LOG = logging.getLogger(__name__)
OPENED = {".safetensors", ".bin", ".model", ".json", ".jinja", ".txt"}  # endings of files that are opened
WEIGHTS = {".safetensors", ".bin"}
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as peft calls them
OWN = {RECORD, "README.md"}  # not listed: the record holds the list, and a card is people's to edit
SINGLES = ("model.safetensors", "pytorch_model.bin")  # each comes before its index, as transformers has it
INDEX = ".index.json"
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
CHANGED = "if you changed it yourself, add accept_changes=true; if not, make it again with: "


def write_record(directory: Path, content: Mapping[str, Any], known: Mapping[str, str] | None = None) -> None:
    """Writes ``fusechat.json``, the last file of a model: content, the command, and the checksum of every file.

    known: xxh3_128 of files for which it was taken while they were written.
    """
    files = _entries(directory, known or {})
    write_json(directory / RECORD, {**content, "command": command_line(), "files": files})


def accept(directory: Path) -> None:
    """Takes a model's files as they are now into its record."""
    held = read_json(directory / RECORD)
    write_json(directory / RECORD, {**held, "files": _entries(directory)})


def check_model(path: str | Path, weights: bool = True) -> None:
    """Compares every file that opening a model reads; those of a Hub id are the Hub's own affair.

    weights: also their files; `checkpoints.LazyCheckpoint` compares them while it reads. Raises `UserError`.
    """
    directory = Path(path)
    if directory.is_file():  # GGUF
        checksums.check_first_use(directory)
    if not directory.is_dir():
        return
    listed, remedy = recorded(directory)
    if changed := _changed(directory, listed, remedy, weights or checksums.accepting()):
        told = f"{directory} was changed since it was made ({'; '.join(changed)})"
        if not checksums.accepting():
            raise UserError(f"{told}; {remedy}")
        LOG.warning("accepted as it is now: %s", told)
        accept(directory)
    foreign = [f for f in sorted(directory.iterdir()) if f.suffix in OPENED and f.name not in {*listed, *OWN}]
    for file in foreign:
        if file.suffix not in WEIGHTS or (weights and _used(file)):
            checksums.check_first_use(file)
    for config in (directory / name for name in CONFIGS):
        if config.exists():
            json_object(config)


def _changed(directory: Path, listed: Mapping[str, checksums.Entry], remedy: str, weights: bool) -> list[str]:
    """What people seem to have edited, file by file. Raises `UserError` for other damage, unless it is to be taken."""
    changed = []
    for name, expected in listed.items():
        try:
            if weights or Path(name).suffix not in WEIGHTS:
                checksums.check(directory / name, expected, remedy)
        except UserError as error:
            told = changes.named(directory / name, expected)
            if told is None and not checksums.accepting():
                raise
            changed.append(told or str(error).removesuffix(f"; {remedy}"))
    return changed


def recorded(directory: Path) -> tuple[Mapping[str, checksums.Entry], str]:
    """What a model's record says of its files, none of a model from elsewhere or of before; and what makes it anew."""
    record = directory / RECORD
    held = read_json(record) if record.exists() else {}
    return held.get("files", {}), CHANGED + str(held.get("command", "its command")) + " overwrite=true"


def judge(file: Path, found: str) -> None:
    """Compares the hash that was taken of a weight file. Raises `UserError` where it is not what it was."""
    listed, remedy = recorded(file.parent)
    if file.name in listed:
        compare(file, found, listed[file.name][ALGORITHM], remedy)
    else:
        checksums.check_first_use(file, found=found)


def _entries(directory: Path, known: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    names = [f.name for f in sorted(directory.iterdir()) if f.is_file() and f.name not in OWN and f.name[0] != "."]
    files = {name: directory / name for name in names}
    return {name: checksums.entry(file, known.get(name)) | changes.values(file) for name, file in files.items()}


def _used(file: Path) -> bool:
    return file.stem == "adapter_model" or file.name in weight_files(file.parent)


def weight_files(directory: Path) -> list[str]:
    """The files that transformers takes a model's weights from; none of a directory without a model.

    Raises `UserError` for an index that names files that are not there, or none.
    """
    for single in SINGLES:
        if (directory / single).exists():
            return [single]
        if (index := directory / (single + INDEX)).exists():
            return _indexed(index)
    return []


def _indexed(index: Path) -> list[str]:
    places = json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} has no weight_map (tensor: file); copy or download it again")
    names = sorted(set(places.values()))
    if absent := [name for name in names if not (index.parent / name).exists()]:
        raise UserError(f"{index} names {absent[0]}, which is missing; copy the model again")
    return names
