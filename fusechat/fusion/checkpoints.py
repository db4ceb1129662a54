"""Checkpoints of a training that may be resumed: the newest whole one, checked before Lightning opens it."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

from fusechat.app import checksums
from fusechat.app.errors import UserError
from fusechat.app.outputs import read_json
from fusechat.fusion.checks import check_checkpoint

LOG = logging.getLogger(__name__)


def to_resume(folder: Path, resume: str | None) -> str | None:
    """The checkpoint that training goes on from. ``last``: where a run of the same settings stopped, if one did.

    Raises `UserError` for a path without a whole one.
    """
    if resume != "last":
        if resume:
            check_checkpoint(resume)
            is_whole(Path(resume))
        return resume
    if found := latest_checkpoint(folder):
        LOG.info("resuming %s", found)
    return str(found) if found else None


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that is whole; one cut short by a kill is passed over.

    Raises `UserError` where it is not what was saved.
    """
    found = sorted(directory.glob("*.ckpt"), key=step_of, reverse=True)
    return next((file for file in found if is_whole(file)), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was not cut short. Raises `UserError` where it is not what was saved.

    One without a list (killed in between, or older) is compared with the CRCs of its own.
    """
    listed, remedy = list_of(checkpoint), f"remove {checkpoint} and run the same command again"
    if listed.exists():
        for name, expected in read_json(listed).items():
            checksums.check(checkpoint.parent / name, expected, remedy)
        return True
    if not zipfile.is_zipfile(checkpoint):
        return False
    with zipfile.ZipFile(checkpoint) as file:
        if bad := file.testzip():
            raise UserError(f"{checkpoint} is damaged (the CRC of {bad} differs); {remedy}")
    return True


def list_of(checkpoint: Path) -> Path:
    """The file beside a checkpoint that has the checksums of its files."""
    return checkpoint.with_name(checkpoint.name + ".json")


def step_of(checkpoint: Path | str | None) -> int:
    """The optimizer step that a checkpoint's name tells."""
    return int("".join(c for c in Path(checkpoint).stem if c.isdigit()) or 0) if checkpoint else 0
