"""Short names that tell folders apart, and the place for what is said of several of them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from fusechat.app.errors import UserError

LONGEST = 80  # characters of a folder's name


def labels(folders: Sequence[str | Path]) -> list[str]:
    """Each folder's path below what all have in common; a single folder's own name.

    Raises `UserError` for a folder that is given twice.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise UserError(f"{twice[0]} is given twice among runs; remove one")
    above = Path(os.path.commonpath([path.parent for path in paths]))
    return [path.relative_to(above).as_posix() for path in paths]


def family(label: str) -> str:
    """A label without its seed: runs of one experiment with several seeds share it."""
    return re.sub(r"(^|[/_-])seed_?\d+$", "", label)


def report_place(runs: Sequence[str] | None, experiment: str, root: str) -> str:
    """Where a report lies: in its experiment; of several runs, beside all experiments, under a name of its own."""
    if not runs:
        return f"{experiment}/report"
    if len(runs) == 1:
        return f"{runs[0]}/report"
    name = "+".join(label.replace("/", "-") for label in labels(runs))
    mark = hashlib.sha256("\n".join(os.path.abspath(run) for run in runs).encode()).hexdigest()[:8]
    return f"{root}/reports/{name[:LONGEST]}-{mark}"
