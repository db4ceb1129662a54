"""The state of an output, as the files of it and beside it tell: what stages themselves go by, and no more is opened.

A finished output has its record; a process at work holds its lock; shards, checkpoints and part files are what an
unfinished one goes on with.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, Literal

from fusechat.app.errors import UserError
from fusechat.app.failures import Failure
from fusechat.app.locks import holder, noted
from fusechat.app.outputs import MANIFEST, RECORD, read_json
from fusechat.app.places import CLAIM

ESTIMATES = "estimates.json"  # in an experiment's folder, by `fusechat new`: output -> seconds and bytes it will take
NEXT_STORE = ".{}.new"  # where a store grows that will replace a finished one
FILES = {".json", ".jsonl", ".csv", ".html"}  # outputs that are no folder
STYLES = {"done": "green", "stale": "yellow", "running": "cyan", "failed": "red", "stopped": "yellow", "to do": ""}
Kind = Literal["done", "stale", "running", "failed", "stopped", "to do"]  # stale: `pipeline.states` alone can tell


@dataclass(frozen=True)
class State:
    """told: since when, how far, why, or what is kept. record: what a finished output says of itself."""

    kind: Kind
    told: str = ""
    record: Mapping[str, Any] | None = None


def state_of(output: Path, failure: Failure | None = None) -> State:
    """The state of an output's place. failure: the last one that is known of it; what was made since counts more."""
    output = output.resolve()
    held, kept = holder(output), kept_of(output)
    if held is not None and not held.gone:
        return State("running", "; ".join(filter(None, [noted(output), f"{held}", kept])))
    record = record_of(output)
    if record is not None:
        try:
            return State("done", f"made {moment(record.stat().st_mtime)}", content(record))
        except UserError as error:
            return State("failed", str(error))
    if failure is not None:
        return State("failed", "; ".join(filter(None, [f"{moment(failure.time)}: {failure.cause}", kept])))
    if held is not None:
        ended = f"its process {held.pid} has ended without a word"
        return State("stopped", "; ".join(filter(None, [ended, kept])))
    return State("stopped", kept) if kept else State("to do")


def record_of(output: Path) -> Path | None:
    """The file that says an output is finished; None where there is none. A result is its own."""
    places = [output] if output.suffix in FILES else [output / RECORD, output / MANIFEST]
    return next((place for place in places if place.is_file()), None)


def content(record: Path) -> dict[str, Any]:
    """What a record says; of an answer file what its note says. Raises `UserError` where it is damaged."""
    if record.suffix == ".json":
        return read_json(record)
    note = record.with_suffix(".fingerprint")
    return read_json(note) if note.is_file() else {}


def kept_of(output: Path) -> str:
    """What an unfinished output goes on with, in words; empty where there is nothing."""
    return next(filter(None, (_shards(output), _checkpoint(output), _samples(output))), "")


def short(output: Path, folder: Path) -> str:
    """An output's place in its experiment's folder; elsewhere its path as it is."""
    here, root = output.resolve(), folder.resolve()
    return str(here.relative_to(root)) if here.is_relative_to(root) else str(output)


def moment(seconds: float) -> str:
    """A point in time, as people here write it."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _shards(output: Path) -> str:
    for folder in (output.with_name(NEXT_STORE.format(output.name)), output):
        if (folder / CLAIM).is_file() and not (folder / MANIFEST).is_file():
            whole = len(list(folder.glob("shard-*.json")))
            totals = [re.fullmatch(r"data-\d+-of-(\d+)\.arrow", file.name) for file in folder.glob("data-*.arrow")]
            total = next((f" of {int(found[1])}" for found in totals if found), "")
            return f"{whole}{total} shards are whole"
    return ""


def _checkpoint(output: Path) -> str:
    folders = [
        folder
        for folder in (output.parent.parent / "checkpoints").glob(f"{escape(output.name)}-*")
        if re.fullmatch(r"[0-9a-f]{16}", folder.name[len(output.name) + 1 :])
    ]
    steps = [re.search(r"\d+", file.stem) for folder in folders for file in folder.glob("*.ckpt")]
    found = [int(step[0]) for step in steps if step]
    return f"a checkpoint of step {max(found)} is kept" if found else ""


def _samples(output: Path) -> str:
    parts = list(output.parent.glob(f"{escape(output.stem)}.*.part")) if output.suffix in FILES else []
    count = max((file.read_bytes().count(b"\n") for file in parts), default=0)
    return f"{count} samples are measured" if parts else ""
