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
from fusechat.new.planned import Estimate, estimate
from fusechat.pipeline.configs import Compose, jobs
from fusechat.pipeline.states import Job, jobs_of
from fusechat.pipeline.steps import Step

RENEWED = ("evaluate", "report", "tiny")  # commands that make anew, unasked, what does not fit


@dataclass(frozen=True)
class Row:
    """An output. bytes: on the disk by now (what is stale is made again beside it), or as expected; seconds: expected
    of what is not done. None: not known, for the reasons in unknown.
    """

    step: int
    verb: str
    output: str
    state: State
    bytes: float | None
    seconds: float | None
    unknown: Sequence[str] = ()


def rows_of(steps: Sequence[Step], compose: Compose, experiment: Path) -> list[Row]:
    """A row for every output, in order; what is not done with what it is expected to take."""
    known = failures.last(experiment / "logs")
    rows, remade, jobs = list[Row](), set[Path](), [*_jobs(steps, compose)]
    for number, job in jobs:
        state, output = job.state(known, remade), job.output
        if state.kind != "done" and output is not None:
            remade.add(output.resolve())
        found = size_of(output) if state.kind in ("done", "stale") and output else None
        rows.append(Row(number, job.verb, short(output, experiment) if output else "-", state, found, None))
    if all(row.state.kind == "done" for row in rows):
        return rows
    guessed = _expected(experiment, [job for _, job in jobs])
    sizes: dict[str, list[float]] = {}
    for row in rows:
        if row.bytes is not None:
            sizes.setdefault(row.verb, []).append(row.bytes)
    return [_guessed(row, job, guessed, sizes) for row, (_, job) in zip(rows, jobs, strict=True)]


def _expected(experiment: Path, jobs: Sequence[Job]) -> Estimate:
    """What `fusechat new` has found, or what models and chats of another experiment say."""
    file = experiment / ESTIMATES
    if file.is_file():
        return Estimate(read_json(file)["outputs"])
    return estimate([(job.verb, job.values) for job in jobs])


def _guessed(row: Row, job: Job, guessed: Estimate, sizes: Mapping[str, Sequence[float]]) -> Row:
    """A row with what it is expected to take; bytes: as far as nothing lies there, else of its command's others."""
    outputs, others = guessed.outputs, sizes.get(row.verb)
    found = outputs.get(row.output) or outputs.get(row.output.partition("/")[0], {})
    room = row.bytes or job.bytes or found.get("bytes") or (median(others) if others else None)
    seconds = found.get("seconds")
    unknown = guessed.unknown if None in (room, seconds) and row.state.kind != "done" else ()
    return replace(row, bytes=room, seconds=seconds, unknown=unknown)


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
    for why in dict.fromkeys(why for row in rows for why in row.unknown):
        console.print(f"not estimated: {why}", highlight=False, markup=False, soft_wrap=True)
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
