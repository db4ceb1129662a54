"""Times and sizes as people say them; ``?`` where one is not known."""

from __future__ import annotations


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return "?"
    for name, unit in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.0f} {name}" if seconds >= 10 * unit else f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def size(number: float | None) -> str:
    """Bytes as people say them."""
    if number is None:
        return "?"
    for name, unit in (("GB", 1e9), ("MB", 1e6)):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number / 1e3:.0f} kB"
