"""How long a process takes to start here. Imports nothing heavy before it is asked."""

from __future__ import annotations

import time

OVER = 1.5  # a process's start over its imports: configs, checks, a model that is opened


def starting() -> float:
    """Seconds that a process takes to start: what its imports take, measured where they are not there yet."""
    began = time.perf_counter()
    import lightning  # noqa: F401  with all that a training imports

    return OVER * (time.perf_counter() - began)
