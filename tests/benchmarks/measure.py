"""Measuring one function: CPU seconds, and how far the process's peak memory rises above where it began."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cost:
    """seconds of CPU time (best of the repeats), megabytes of memory above the start."""

    seconds: float
    megabytes: float


def resident(key: str = "VmRSS:") -> float:
    """Megabytes of this process: resident, ``RssAnon:`` without memory-mapped files, or ``VmHWM:``, the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measure(
    work: Callable[[], Any], reset: Callable[[], Any], repeats: int = 3, key: str = "RssAnon:", warm: bool = True
) -> Cost:
    """Runs ``work`` once to warm up, then measures it; ``reset`` drops what it left, before memory is read."""
    if warm:
        work()
    seconds, peak = [], 0.0
    for _ in range(repeats):
        reset()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before, stop, top = resident(key), threading.Event(), [0.0]

        def watch(stop: threading.Event = stop, top: list[float] = top) -> None:
            while not stop.is_set():
                top[0] = max(top[0], resident(key))
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.thread_time()
        result = work()
        seconds.append(time.thread_time() - start)
        stop.set()
        watcher.join()
        del result
        peak = max(peak, top[0] - before)
    return Cost(min(seconds), peak)


def table(title: str, header: list[str], rows: list[list[Any]]) -> None:
    """Prints a Markdown table."""
    print(f"\n### {title}\n\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print(
            "| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) + " |",
            flush=True,
        )
