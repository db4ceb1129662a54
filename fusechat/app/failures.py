"""What failed last, and why: one line a failed job in its experiment's logs, for `fusechat status` and dry runs."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.sealed import seal, unsealed

NAME = "failures.jsonl"


@dataclass(frozen=True)
class Failure:
    """A job that ended with an error. output: the place that it writes; time: seconds since 1970."""

    output: str
    verb: str
    cause: str
    command: str
    time: float


def note(cfg: Any, cause: str, command: str) -> None:
    """Appends a job's failure to its experiment's logs; nothing where the experiment has no folder yet."""
    with suppress(Exception):  # whatever it is, the error itself is told
        output = str(cfg.get("output_file") or cfg.get("output_dir") or "")
        if output and cfg.stage != "pipeline" and Path(cfg.paths.experiment).is_dir():
            failure = Failure(str(Path(output).resolve()), cfg.stage, cause, command, time.time())
            file = Path(cfg.paths.logs) / NAME
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as opened:
                opened.write("\n" + seal(json.dumps(asdict(failure))) + "\n")


def last(logs: Path) -> dict[str, Failure]:
    """Output -> its last failure."""
    found: dict[str, Failure] = {}
    for line in (logs / NAME).read_bytes().split(b"\n") if (logs / NAME).is_file() else ():
        with suppress(UserError, TypeError):  # cut short by a kill
            if line:
                failure = Failure(**unsealed(line, NAME))
                found[failure.output] = failure
    return found
