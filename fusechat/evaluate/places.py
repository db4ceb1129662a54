"""Whose result a file is: two models of the same short name do not write over each other."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from fusechat.app.errors import UserError
from fusechat.app.outputs import read_json
from fusechat.evaluate.notes import note_of, read_note

LOG = logging.getLogger(__name__)


def place(wanted: Path, model: str, experiment: str) -> Path:
    """``wanted``, or where that holds another model's result, the same name with a hash of this model's path appended.

    A model is known by its place in its experiment (targets/a), so that a copy of an experiment goes on with its own
    files; models elsewhere by their whole path.
    """
    here = identity(model, experiment)
    other = _held_by(wanted)
    if other is None or other == here:
        return wanted
    suffix = hashlib.sha256(here.encode()).hexdigest()[:6]
    found = wanted.with_name(f"{wanted.stem}-{suffix}{wanted.suffix}")
    LOG.info("%s holds the result of %s; that of %s goes to %s", wanted, other, model, found)
    return found


def identity(model: str, experiment: str) -> str:
    """A model's path within its experiment's folder, else its whole path; a Hub id as it is."""
    if not Path(model).is_dir():  # also one that is gone since it was evaluated
        inside = Path(model).is_relative_to(experiment) if experiment else False
        return str(Path(model).relative_to(experiment)) if inside else model
    path, folder = Path(model).resolve(), Path(experiment).resolve()
    return str(path.relative_to(folder)) if experiment and path.is_relative_to(folder) else str(path)


def _held_by(output: Path) -> str | None:
    """Whose result is there, as `identity` has it; None where there is none or it does not say."""
    if not output.is_file():
        return None
    note = note_of(output)
    if note.exists():  # an answer file: the models of older ones are not known
        return str(read_note(note)["model"]) or None
    try:
        content = read_json(output)
    except UserError:
        return None
    if "model" not in content:
        return None
    experiment = content.get("config", {}).get("paths", {}).get("experiment", "")
    return identity(content["model"], experiment)
