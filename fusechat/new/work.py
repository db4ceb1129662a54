"""From what was asked to an experiment on the disk: models and chats opened and checked, then files written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.outputs import write_durably, write_json, write_lines
from fusechat.app.states import ESTIMATES
from fusechat.chats.formats import load_chats
from fusechat.chats.mixture import paths_of
from fusechat.chats.render import renderer_for
from fusechat.models.gguf import check_plain
from fusechat.models.load import load_tokenizer
from fusechat.new.asked import Asked
from fusechat.new.estimates import LIBRARIES, Work
from fusechat.new.facts import SAMPLE, Lengths, Model, facts_of, lengths_of, speed_of, split
from fusechat.new.writing import rows_of, step_of, text_of

LONGEST = 2048  # tokens of a chat, as published


def looked(own: Asked, start: float) -> tuple[Work, str]:
    """What the experiment will take, and its file's text, both written. start: seconds that a process takes to start.

    Raises `UserError` for models that cannot be opened or take no part, for chats that are none or too few, and where
    files that this would write are there with another content.
    """
    check_plain(own.pivot, "pivot")
    paths = {"pivot": own.pivot, **own.sources}
    tokenizers = {name: load_tokenizer(path) for name, path in paths.items()}
    pivot, *sources = [facts_of(name, paths[name], tokenizer) for name, tokenizer in tokenizers.items()]
    contexts = [model.context for model in (pivot, *sources) if model.context]
    max_length = own.max_length or min(LONGEST, *contexts)
    template = "native" if all(model.template for model in (pivot, *sources)) else "pivot"
    renderers = {
        name: renderer_for(tokenizer, tokenizers["pivot"], template, max_length)
        for name, tokenizer in tokenizers.items()
    }
    rows, tests, written = _chats(own)
    sample = sample_of(rows)
    lengths = {name: lengths_of(renderer(sample)) for name, renderer in renderers.items()}
    speed = speed_here(pivot, renderers["pivot"], rows)
    work = Work(pivot, sources, lengths, len(rows), len(tests), start, speed)
    text = _text(own, work, lengths["pivot"], {"template": template, "max_length": max_length}, written)
    _write(own, work, text, {} if own.tests else {"fusion": rows, "test": tests})
    return work, text


def sample_of(rows: Any) -> list[Any]:
    """Messages of some chats, evenly over all, to know their lengths."""
    return [row["messages"] for row in rows[:: max(1, len(rows) // SAMPLE)]]


def speed_here(pivot: Model, renderer: Any, rows: Any) -> float | None:
    """`speed_of` the pivot; None where it is no directory here, or too large for this machine."""
    fits = Path(pivot.path).is_dir() and 4 * pivot.total + LIBRARIES < room() / 2
    return speed_of(pivot, renderer, rows) if fits else None


def room() -> float:
    """Bytes of memory that are free: the accelerator's, or the machine's."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    known = Path("/proc/meminfo")
    for line in known.read_text().splitlines() if known.exists() else ():
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _chats(own: Asked) -> tuple[Any, Any, tuple[Any, Any]]:
    """Chats, tests, and how the experiment's file names them."""
    rows = load_chats(own.chats)[0].to_list()
    if own.tests is not None:
        return rows, load_chats(own.tests, split="test")[0].to_list(), (_named(own.chats), _named(own.tests))
    here = f"${{paths.root}}/{own.name}/chats"  # whatever experiment_name another run of the file has
    return *split(rows, ", ".join(paths_of(own.chats))), (f"{here}/fusion.jsonl", f"{here}/test.jsonl")


def _named(given: Any) -> Any:
    """Chats as they are named wherever the experiment is used from."""
    if isinstance(given, list):
        return [_named(each) for each in given]
    if isinstance(given, Mapping):
        return {**given, "path": _named(given["path"])}
    return str(Path(given).absolute()) if Path(given).exists() else given


def _text(own: Asked, work: Work, lengths: Lengths, chat: Mapping[str, Any], written: tuple[Any, Any]) -> str:
    return text_of(
        own.name,
        own.folder,
        work.pivot,
        work.sources,
        lengths,
        chats=written[0],
        tests=written[1],
        counts=(work.chats, work.tests),
        **chat,
        micro_batch=work.micro_batch(step_of(work.chats), room()),
    )


def _write(own: Asked, work: Work, text: str, parts: Mapping[str, Any]) -> None:
    """Writes chats, estimates and, last, the file. Raises `UserError` where other chats lie there already."""
    lines = {own.runs / "chats" / f"{name}.jsonl": rows_of(rows) for name, rows in parts.items()}
    for file, content in lines.items():
        if file.exists() and not own.overwrite and file.read_text(encoding="utf-8").splitlines() != content:
            raise UserError(f"{file} holds other chats; choose another name, or add overwrite=true to replace them")
    for file, content in lines.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_lines(file, content)
    write_json(own.runs / ESTIMATES, {"stage": "new", "outputs": work.outputs()})
    own.file.parent.mkdir(parents=True, exist_ok=True)
    write_durably(own.file, text.encode())
