"""What ``fusechat new`` says: models, chats, what the stages will take, and the command that comes next."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.table import Table

from fusechat.app.quantities import duration, size
from fusechat.app.verbs import as_typed
from fusechat.new.asked import Asked
from fusechat.new.estimates import Expected, Work
from fusechat.new.facts import Model
from fusechat.new.work import room
from fusechat.new.writing import millions, step_of

MUCH = 0.01  # share of the chats that are cut, above which that is said aloud


def tell(own: Asked, work: Work, text: str) -> None:
    """Prints all of it; warnings stand between the tables and the command."""
    console = Console()
    console = console if console.is_terminal else Console(width=130)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    console.print(_models(work))
    mine = work.lengths["pivot"]
    say(
        f"\n{work.chats:,} chats to fuse with, {work.tests:,} to test with; {mine.tokens:,.0f} of the pivot's tokens "
        f"each, {mine.positions:,.0f} of them answers\n"
    )
    console.print(_stages(work))
    micro = work.micro_batch(step_of(work.chats), room())
    needed = work.memory(micro)
    say(
        f"memory: about {size(needed['train'])} to train with {micro} chats at a time, {size(needed['extract'])} to "
        f"extract; {size(room())} are free"
    )
    for line in warnings(work, needed["train"]):
        say(f"note: {line}")
    say(f"\n{own.file} is written, about {len(text.splitlines())} lines, yours to edit. Then:")
    rest = [] if str(own.root) == "runs" else [f"paths.root={own.root}"]
    command = shlex.join(["--config-dir", str(own.folder), f"experiment={own.name}", *rest])
    say(f"  {as_typed(f'python -m fusechat.pipeline {command}')} pipeline.dry_run=true   # the plan")
    say(f"  {as_typed(f'python -m fusechat.pipeline {command}')}")


def warnings(work: Work, needed: float) -> list[str]:
    """What may spoil the result."""
    found = [
        f"{name} reads {lengths.cut:.1%} of the chats only in part; max_length=N keeps more of them"
        for name, lengths in work.lengths.items()
        if lengths.cut > MUCH
    ]
    if unnamed := [model.name for model in _all(work) if not model.licence]:
        found.append(f"no licence is named here for {', '.join(unnamed)}: look it up before you pass a target on")
    if needed > room():
        found.append("a training does not fit into the memory that is free; see lora.enabled and trainer=fsdp")
    if work.speed is None:
        found.append("the pivot's speed was not measured: it is not a directory here, or too large for this machine")
    return found


def _models(work: Work) -> Table:
    table = Table("model", "is", "parameters", "vocabulary", "context", "chat template", "licence", box=None)
    for model in _all(work):
        active = f" ({millions(model.active)} a token)" if model.active != model.total else ""
        parameters = millions(model.total) + active
        template = "its own" if model.template else "none"
        context = f"{model.context:,}" if model.context else "?"
        cells = (model.kind, parameters, f"{model.vocabulary:,}", context, template, model.licence or "?")
        table.add_row(model.name, *cells)
    return table


def _stages(work: Work) -> Table:
    table = Table("expected", "time", "disk", box=None)
    total: Expected = {"seconds": 0.0, "bytes": 0.0}
    for stage, expected in work.stages().items():
        table.add_row(stage, duration(expected["seconds"]), size(expected["bytes"]))
        total = {
            key: None if value is None or expected[key] is None else value + expected[key]  # type: ignore[operator]
            for key, value in total.items()
        }
    table.add_row("all", duration(total["seconds"]), size(total["bytes"]))
    return table


def _all(work: Work) -> list[Model]:
    return [work.pivot, *work.sources]
