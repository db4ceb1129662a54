"""The bar that shows how far an extraction is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fusechat.extract.processes import Tell


@contextmanager
def progress(total: int, done: int) -> Iterator[Tell]:
    """Shows chats and tokens per second for the time of a block. done: chats of earlier runs, of ``total``."""
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("extract"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    tokens_done = 0
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("chats", total=total, completed=done, rate="")

        def tell(chats: int, tokens: int) -> None:
            nonlocal tokens_done
            tokens_done += tokens
            elapsed = bar.tasks[0].elapsed or 1e-9
            bar.update(task, advance=chats, rate=f"{tokens_done / elapsed:,.0f} tokens/s")

        yield tell
