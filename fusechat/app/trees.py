"""Nested mappings as one level of dotted keys, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested config -> one level with dotted keys, the columns that runs are compared by; empty mappings have none."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    pairs = [flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items()]
    return {key: value for pair in pairs for key, value in pair.items()}


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `flatten` flattens."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree
