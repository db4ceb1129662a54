"""One process per device, each with work of its own and no word between them: unequal work cannot hang."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from fusechat.app.errors import UserError

Tell = Callable[[int, int], None]  # chats and tokens done since it was last told
Work = Callable[[torch.device | None, Sequence[int], Tell], None]  # where it runs, the numbers of its parts
EVERY = 0.2  # seconds between two looks at what the processes have done


def share(work: Work, parts: Sequence[int], devices: Sequence[torch.device | None], tell: Tell) -> None:
    """Does all parts: here, where there is one device, else in a process for each, which takes every n-th part.

    work: can be pickled. Raises the `UserError` of the first process that fails, or one that says how it was ended; the
    others are ended then, and all of them where this process is.
    """
    devices = devices[: len(parts)]
    if not devices:
        return
    if len(devices) == 1:
        work(devices[0], parts, tell)
        return
    logging.getLogger(spawn.__module__).setLevel(logging.ERROR)  # that it ends the others need not be told
    context = multiprocessing.get_context("spawn")
    done, mistakes = context.RawArray("q", 2 * len(devices)), context.SimpleQueue()
    given = (work, parts, devices, torch.get_num_threads(), done, mistakes)
    started = spawn(_process, given, nprocs=len(devices), join=False)  # type: ignore[no-untyped-call]
    told = [0, 0]
    try:
        ended = False
        while not ended:
            ended = started.join(EVERY)
            now = [sum(done[::2]), sum(done[1::2])]
            tell(now[0] - told[0], now[1] - told[1])
            told = now
    except ProcessExitedException as error:
        if not mistakes.empty():
            raise UserError(mistakes.get()) from None
        where = devices[error.error_index]
        how = f"signal {error.signal_name}" if error.signal_name else f"exit code {error.exit_code}"
        raise UserError(
            f"the process of {where} ended by {how}; what is whole is kept: run the same command again"
        ) from None
    finally:
        for process in started.processes:
            process.terminate()
            process.join()


def _process(
    rank: int, work: Work, parts: Sequence[int], devices: Sequence[torch.device], threads: int, done: Any, mistakes: Any
) -> None:
    """What a process does. threads: as many as one process alone would use, so that it computes the same bytes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # how torch ends it with its parent, if ignored until now
    torch.set_num_threads(threads)
    if devices[rank].type != "cpu":
        torch.accelerator.set_device_index(devices[rank])  # kernels of others run on the current device

    def tell(chats: int, tokens: int) -> None:
        done[2 * rank] += chats
        done[2 * rank + 1] += tokens

    try:
        work(devices[rank], parts[rank :: len(devices)], tell)
    except UserError as error:
        mistakes.put(str(error))
        sys.exit(1)
