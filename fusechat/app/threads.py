"""How many threads compiled code of ours uses, and how it is shared out: the one place.

numba's own parallel layers are not used: its OpenMP layer resets torch's thread count in mid-process, so that a result
would depend on which stages ran before it. Kernels are compiled with ``nogil=True`` and called from Python threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def count() -> int:
    """``OMP_NUM_THREADS`` where it is set, as for torch; else the cores that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if given.isdigit():
        return max(1, int(given))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(work: Callable[[int], object], parts: int) -> None:
    """Calls ``work(0) … work(parts - 1)``, each in a thread of its own; what they write must not overlap."""
    if parts == 1:
        work(0)
        return
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(work, range(parts)))
