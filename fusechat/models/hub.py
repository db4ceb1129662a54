"""Models by folder or Hub id: what lies here is taken as it is, what does not is downloaded once."""

from __future__ import annotations


def local_model(name: str) -> str:
    """The folder of a model."""
    return name
