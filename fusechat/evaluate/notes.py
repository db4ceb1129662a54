"""Answer files, which have room for answers alone, and the note beside each that says which they are."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusechat.app import checksums
from fusechat.app.outputs import read_json, write_durably, write_json, write_lines
from fusechat.evaluate.kinds import Sample, Work

LOG = logging.getLogger(__name__)


def note_of(output: Path) -> Path:
    """The file beside an answer file that says which answers these are: fingerprint, model, and checksum."""
    return output.with_suffix(".fingerprint")


def check_answers(output: Path) -> None:
    """Compares an answer file's checksum. Raises `UserError` where it is damaged."""
    note = note_of(output)
    expected = read_note(note).get("files", {}).get(output.name) if note.exists() else None
    if expected:
        checksums.check(output, expected, "evaluate again with overwrite=true")
    else:
        checksums.check_first_use(output)


def read_note(note: Path) -> dict[str, Any]:
    """What it says. Older ones are text: the fingerprint, below it the model. Raises `UserError` for a damaged one."""
    text = note.read_bytes()
    if b"{" in text[:2] or b'checksum"' in text:
        return read_json(note)
    mark, _, model = text.decode(errors="replace").partition("\n")
    return {"fingerprint": mark, "model": model.strip()}


def write_answers(output: Path, records: list[Sample], work: Work, about: Mapping[str, Any]) -> None:
    """Writes answers in the form that ``work`` says, and their note; whose they are is noted before they are there."""
    write_durably(note_of(output), f"\n{about['model']}\n".encode())
    if work.answers == "list":
        write_json(output, records)
    else:
        write_lines(output, [json.dumps(record) for record in records])
    says = {key: about[key] for key in ("asked", "fingerprint", "model")}
    write_json(note_of(output), {**says, "files": {output.name: checksums.entry(output)}})
    LOG.info("%d questions answered by %s: %s", len(records), about["model"], output)
