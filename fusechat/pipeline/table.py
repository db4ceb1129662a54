"""A pipeline's plan on the terminal: every output with its state, and what time and room it is likely to take."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from fusechat.app import failures
from fusechat.app.outputs import read_json
from fusechat.app.quantities import duration, size
from fusechat.app.session import plain
from fusechat.app.states import ESTIMATES, STYLES, State, short
from fusechat.pipeline.configs import Compose, jobs
from fusechat.pipeline.states import Job, jobs_of
from fusechat.pipeline.steps import Step

RENEWED = ("evaluate", "report", "tiny")  # commands that make anew, unasked, what does not fit


@dataclass(frozen=True)
class Row:
    """An output. bytes: on the disk by now (what is stale is made again beside it), or as expected; seconds: expected
    of what is not done. None: not known.
    """

    step: int
    verb: str
    output: str
    state: State
    bytes: float | None
    seconds: float | None


def rows_of(steps: Sequence[Step], compose: Compose, experiment: Path) -> list[Row]:
    """A row for every output, in order."""
    known = failures.last(experiment / "logs")
    file = experiment / ESTIMATES
    expected = read_json(file)["outputs"] if file.is_file() else {}
    rows, remade, sizes = [], set[Path](), dict[str, list[int]]()
    for number, job in _jobs(steps, compose):
        state, output = job.state(known, remade), job.output
        if state.kind != "done" and output is not None:
            remade.add(output.resolve())
        found = size_of(output) if state.kind in ("done", "stale") and output else None
        if found is not None:
            sizes.setdefault(job.verb, []).append(found)
        name = short(output, experiment) if output else "-"
        guess = expected.get(name) or expected.get(name.partition("/")[0], {})
        room = found or guess.get("bytes") or job.bytes
        rows.append(Row(number, job.verb, name, state, room, guess.get("seconds")))
    return [_like_others(row, sizes) for row in rows]


def print_plan(rows: Sequence[Row], experiment: Path) -> None:
    """The table, and below it what is to do in all."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("step", "command", "output", "state", "", box=None, pad_edge=False)
    for name in ("disk", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        state = Text(row.state.kind, STYLES[row.state.kind])
        time = "" if row.state.kind == "done" else duration(row.seconds)
        cells = (str(row.step), row.verb, row.output, state, row.state.told, size(row.bytes), time)
        table.add_row(*cells)
    console = Console(soft_wrap=False)
    console = console if console.is_terminal else Console(width=160)
    console.print(table)
    console.print(summary(rows, experiment), highlight=False)
    if stale := next((row.output for row in rows if row.state.kind == "stale" and row.verb not in RENEWED), None):
        console.print(f"{stale} was made with other settings: overwrite=true makes it anew", highlight=False)


def summary(rows: Sequence[Row], experiment: Path) -> str:
    """``4 done, 14 to do; left: about 12 min and 1.2 GB of 30 GB that are free``; what is not known is counted."""
    counts = Counter(row.state.kind for row in rows)
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    left = [row for row in rows if row.state.kind != "done"]
    if not left:
        return f"{told}; nothing is left to do"
    above = next(place for place in (experiment.absolute(), *experiment.absolute().parents) if place.is_dir())
    seconds = [row.seconds for row in left if row.seconds is not None]
    sizes = [row.bytes for row in left if row.bytes is not None]
    time = f"about {duration(sum(seconds))}" if seconds else "an unknown time"
    disk = f"about {size(sum(sizes))}" if sizes else "an unknown part"
    unknown = len(left) - min(len(seconds), len(sizes))
    beside = f", beside {unknown} not estimated" if 0 < unknown < len(left) else ""
    return f"{told}; left{beside}: {time}, and {disk} of {size(shutil.disk_usage(above).free)} that are free"


def size_of(output: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [output] if output.is_file() else [file for file in output.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _jobs(steps: Sequence[Step], compose: Compose) -> Iterator[tuple[int, Job]]:
    """Every job with the number of its step."""
    for number, step in enumerate(steps, 1):
        for (verb, _), config in jobs(step, compose):
            for one in jobs_of(verb, plain(config)):
                yield number, one


def _like_others(row: Row, sizes: Mapping[str, Sequence[int]]) -> Row:
    """A row whose size is not known has that of its command's other outputs that are there."""
    others = sizes.get(row.verb)
    return replace(row, bytes=median(others)) if row.bytes is None and others else row
