"""What wandb's files on the disk say of a run."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusechat.app.trees import flatten
from tests.conftest import Mini

# LevelDB's log format: blocks of records with crc (4 bytes), length (2) and type (1: whole; 2 to 4: first, middle,
# last)
BLOCK = 32768


def records(file: Path) -> Iterator[Any]:
    """The protobuf records of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):  # what is not flushed yet is left out
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def key_of(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def files(world: Mini) -> set[Path]:
    return set(world.experiment.rglob("offline-run-*/*.wandb"))


def ended(file: Path, seconds: float = 120) -> list[Any]:
    """The records of a run once its last one, the exit, is in the file: another process writes it."""
    last = time.monotonic() + seconds
    while True:
        found = [*records(file)]
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < last, f"{file} has no exit record"
        time.sleep(0.1)


def followed(world: Mini, name: str, *overrides: str) -> "Run":
    """Runs an entry; what the one run that it has logged says."""
    before = files(world)
    world.run(name, *overrides, "logger=wandb_offline")
    (made,) = files(world) - before
    return Run(made)


class Run:
    """What the file of an ended run says."""

    def __init__(self, file: Path) -> None:
        found = ended(file)
        self.about = next(r.run for r in found if r.WhichOneof("record_type") == "run")
        self.nested = {
            key_of(i): json.loads(i.value_json) for r in found for i in (*r.run.config.update, *r.config.update)
        }
        self.config = flatten(self.nested)
        updates = [i for r in found for i in r.summary.update]
        self.summary = flatten({key_of(i): json.loads(i.value_json) for i in updates})
        self.history = {key_of(i): json.loads(i.value_json) for r in found for i in r.history.item}
        self.columns = {key: value for key, value in self.config.items() if not key.startswith("_")}
        self.media = {key.removesuffix("/_type") for key in self.history if key.endswith("/_type")}
        self.metrics = {r.metric.name: r.metric for r in found if r.WhichOneof("record_type") == "metric"}
        requests = [
            r.request.log_artifact.artifact for r in found if r.request.WhichOneof("request_type") == "log_artifact"
        ]
        self.artifacts = {
            a.name: a
            for a in [*requests, *(r.artifact for r in found if r.WhichOneof("record_type") == "artifact")]
            if a.name
        }
